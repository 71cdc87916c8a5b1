"""Strategies of fine-tuning beside the head they start from, on the images that it was tested on.

The model is trained beforehand, such as `embedder train features model`. What was tuned before
into OUT is not tuned again.

    python benchmarks/finetuning.py MODEL SOURCE OUT --augment flip vertical-flip
"""

import argparse
import sys
from pathlib import Path

from embedder.analysis import compare, row_of
from embedder.finetuning import Watcher, finetune
from embedder.finetuning.augmentation import AUGMENTATIONS
from embedder.finetuning.options import STRATEGIES, TuneOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--augment", nargs="+", choices=AUGMENTATIONS)
    parser.add_argument("--views", type=int)
    parser.add_argument("--epochs", type=int)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    watch = Watcher(epoch=lambda epoch: print(epoch, file=sys.stderr, flush=True))
    for name in options.strategies:
        is_cached = STRATEGIES[name].is_cut
        tuning = TuneOptions(
            strategy=name,
            epochs=options.epochs,
            augment=tuple(options.augment) if options.augment and not is_cached else None,
            views=options.views if is_cached else None,
        )
        finetune(options.model, options.source, options.out / name, tuning, watch=watch)
    rows = compare([options.model, *(options.out / name for name in options.strategies)])
    print("| strategy | accuracy | coarse | gain in points | McNemar p | seconds | weights tuned |")
    print("|---|---|---:|---|---:|---:|---:|")
    for row in (row_of(*pair) for pair in rows):
        accuracy, found, coarse = row["accuracy"], row["against_first"], row["coarse_accuracy"]
        gain = "-"
        if found is not None:
            value, low, high = (100 * found["gain"][name] for name in ("value", "low", "high"))
            gain = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
        print(
            f"| {row['kind']} "
            f"| {accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f}) "
            f"| {'-' if coarse is None else f'{coarse:.3f}'} | {gain} "
            f"| {'-' if found is None else format(found['p_value'], '.2g')} "
            f"| {row['seconds']:.0f} "
            f"| {'-' if row['num_tuned'] is None else format(row['num_tuned'], ',')} |"
        )


if __name__ == "__main__":
    main()
