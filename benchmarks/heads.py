"""Every head on stores of one archive with an official split, as `embedder train` trains it.

Stores are made beforehand, such as `embedder extract grocery lite0` or, with eight views of each
image, `embedder extract grocery lite0-views --views 8`.

    python benchmarks/heads.py STORE ... --labels parent --split grocery --coarse 'grocery/*.txt:3'
"""

import argparse
import time

import embedder
from embedder.heads import HEADS
from embedder.report import notes_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stores", nargs="+")
    parser.add_argument("--labels", default="folder")
    parser.add_argument("--split", default="0.2")
    parser.add_argument("--coarse")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    options = parser.parse_args()
    print(
        "| backbone | views | head | accuracy | coarse | log-loss | calibration error | seconds |"
    )
    print("|---|---:|---|---|---:|---:|---:|---:|")
    for path in options.stores:
        store = embedder.Store(path)
        for name in options.heads:
            began = time.perf_counter()
            head = embedder.train(
                store, options.labels, name, split=options.split, coarse=options.coarse
            )
            seconds = time.perf_counter() - began
            scores = head.evaluate()
            accuracy, coarse = scores["accuracy"], "-"
            if head.coarse_of is not None:
                coarse = f"{head.test.hierarchical(head.coarse_of)['coarse_accuracy']['value']:.3f}"
            print(
                f"| {store.recipe.backbone} | {store.recipe.views} | {name} "
                f"| {accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f}) "
                f"| {coarse} | {scores['log_loss']['value']:.3f} | {scores['ece']['value']:.3f} "
                f"| {seconds:.1f} |",
                flush=True,
            )
    print()
    print("\n".join(notes_of(head, head.metrics())))


if __name__ == "__main__":
    main()
