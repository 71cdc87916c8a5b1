"""What near-duplicates across a split do to a score, and what taking care of them is worth.

Of the demo's photographs some are taken, and each is planted again as slightly changed copies:
saved again at a JPEG quality of 75 to 95, and 5 % darker to brighter. A head is tested by
cross-validation with random folds, and with folds that near-duplicates, as they are found, never
straddle; the photographs without copies tell what the honest score is.

    python benchmarks/leak.py --images 900 --copies 2
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

import embedder
from embedder.sources import images_folder


def plant(photo: Path, target: Path, num_copies: int, random: np.random.Generator) -> None:
    """Write a photograph and its copies, `NAME.jpg` and `NAME-copy-N.jpg`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(photo) as picture:
        picture.load()
    picture.save(target, quality=95)
    for number in range(num_copies):
        copy = ImageEnhance.Brightness(picture).enhance(random.uniform(0.95, 1.05))
        name = f"{target.stem}-copy-{number}.jpg"
        copy.save(target.with_name(name), quality=int(random.integers(75, 96)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--heads", nargs="+", default=["knn", "logistic"])
    parser.add_argument("--folds", type=int, default=5)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    source = images_folder()
    photos = sorted(source.rglob("*.jpg"))
    chosen = sorted(random.choice(len(photos), options.images, replace=False))
    with tempfile.TemporaryDirectory() as scratch:
        for row in chosen:
            target = photos[row].relative_to(source)
            plant(photos[row], Path(scratch) / "planted" / target, options.copies, random)
            plant(photos[row], Path(scratch) / "originals" / target, 0, random)
        stores = {
            name: embedder.extract(Path(scratch) / name, Path(scratch) / f"{name}-features")
            for name in ("originals", "planted")
        }
        split = f"kfold:{options.folds}"
        for name in options.heads:
            honest = embedder.train(stores["originals"], head=name, split=split)
            careful = embedder.train(stores["planted"], head=name, split=split)
            leak = careful.leak()
            print(f"{name}, {options.folds}-fold:")
            for what, score in {
                "without copies": honest.evaluate()["accuracy"],
                f"with {options.copies} copies of each, random split": leak["naive"],
                "with copies, near-duplicates kept together": careful.evaluate()["accuracy"],
            }.items():
                print(
                    f"  {what:<45} {score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
                )
        stems = [Path(image_id).stem.split("-copy-")[0] for image_id in careful.images.ids]
        groups = careful.images.groups
        truth = np.unique(stems, return_inverse=True)[1]
        same_group = groups[:, None] == groups
        same_photo = (truth[:, None] == truth) & ~np.eye(len(truth), dtype=bool)
        found = (same_group & same_photo).sum() / same_photo.sum()
        wrong = (same_group & ~same_photo).sum() - len(truth)
        print(
            f"{found:.3f} of the planted pairs are in one group; {wrong // 2:,} pairs of different "
            f"photographs are too; the largest group holds {leak['largest']}"
        )


if __name__ == "__main__":
    main()
