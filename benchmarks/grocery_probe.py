"""A linear probe on frozen features of the Grocery Store photographs, on the official split.

Standardised features and logistic regression (C = 1), trained on the train list and scored on the
test list, for the 81 fine and the 43 coarse classes. Reads the data set as it is published.

    python benchmarks/grocery_probe.py path/to/grocery
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import embedder
from embedder.backbones import BACKBONES
from embedder.recipe import DEFAULT_BACKBONE


def read_list(file: Path) -> dict[str, tuple[str, str]]:
    """Fine and coarse class by path."""
    rows = (line.split(",") for line in file.read_text().splitlines() if line.strip())
    return {path.strip(): (fine.strip(), coarse.strip()) for path, fine, coarse in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grocery", type=Path, help="folder with train.txt and test.txt")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, choices=BACKBONES)
    parser.add_argument("--weights", default="imagenet", help="as in `embedder extract`")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--decode", default="scaled", choices=["scaled", "exact"])
    options = parser.parse_args()
    recipe = {
        name: getattr(options, name) for name in ("backbone", "weights", "precision", "decode")
    }
    with tempfile.TemporaryDirectory() as scratch:
        store = embedder.extract(options.grocery, Path(scratch) / "s", **recipe)
        vectors = dict(zip(store.ids(), store.vectors(), strict=True))
    train, test = (read_list(options.grocery / f"{name}.txt") for name in ("train", "test"))
    print(
        f"{', '.join(recipe.values())}: {len(train):,} images to train on, {len(test):,} to test on"
    )
    for level, name in enumerate(("fine", "coarse")):
        head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        head.fit(
            np.stack([vectors[path] for path in train]),
            [labels[level] for labels in train.values()],
        )
        features = np.stack([vectors[path] for path in test])
        accuracy = head.score(features, [labels[level] for labels in test.values()])
        print(f"{name}: accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
