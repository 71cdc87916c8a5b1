"""Augmentation in the graph: what is done to training batches, on the device, by Keras's layers."""

from typing import TYPE_CHECKING, Any, get_args

from embedder.finetuning.options import Augmentation
from embedder.libraries import import_keras

if TYPE_CHECKING:
    import keras

AUGMENTATIONS = get_args(Augmentation)
_OF_LABELS = ("mixup", "cutmix")  # of images with them: arXiv 1710.09412 and 1905.04899
_SHIFT = 0.1  # share of the side
_ZOOM = 0.25  # how much of the side is cut away at most
_TURN = 15 / 360  # of a full turn, to either side
_JITTER = 0.2  # brightness and contrast, to either side; saturation is halved at most


class Augmenter:
    """Augments batches of images and their targets.

    Attributes:
        layers: Keras's layers, whose random states belong to the state of a training.
    """

    def __init__(self, names: tuple[Augmentation, ...], seed: int) -> None:
        """Make the layers.

        Args:
            names: Of `AUGMENTATIONS`, in any order; they are done in theirs.
            seed: Of all that is random.
        """
        layers = import_keras().layers
        makers: dict[str, list[Any]] = {
            "flip": [lambda **k: layers.RandomFlip("horizontal", **k)],
            "vertical-flip": [lambda **k: layers.RandomFlip("vertical", **k)],
            "crop": [
                lambda **k: layers.RandomTranslation(_SHIFT, _SHIFT, **k),
                lambda **k: layers.RandomZoom((-_ZOOM, 0.0), **k),
            ],
            "rotation": [lambda **k: layers.RandomRotation(_TURN, **k)],
            "colour": [
                lambda **k: layers.RandomBrightness(_JITTER, value_range=(0, 255), **k),
                lambda **k: layers.RandomContrast(_JITTER, value_range=(0, 255), **k),
                lambda **k: layers.RandomSaturation((0.25, 0.75), value_range=(0, 255), **k),
            ],
            "mixup": [lambda **k: layers.MixUp(alpha=0.2, **k)],
            "cutmix": [lambda **k: layers.CutMix(factor=(1.0, 1.0), **k)],
        }
        self._of_images: list[keras.Layer] = []
        self._of_labels: list[keras.Layer] = []
        for place, name in enumerate(AUGMENTATIONS):
            made = self._of_labels if name in _OF_LABELS else self._of_images
            for number, maker in enumerate(makers[name] if name in names else []):
                # In float32 whatever the network computes in: a pixel wants all of its bits.
                made.append(maker(seed=seed + 10 * place + number, dtype="float32"))
        self.layers = self._of_images + self._of_labels

    def __call__(self, pixels: Any, targets: Any) -> tuple[Any, Any]:
        """Augment one batch.

        Args:
            pixels: float32 (batch, height, width, 3), 0 to 255.
            targets: float32 (batch, n_classes).

        Returns:
            Both, of the same shapes; pixels again within 0 to 255. A mixed image has a share of
            each of its classes.
        """
        ops = import_keras().ops
        for layer in self._of_images:
            pixels = layer(pixels, training=True)
        if self._of_images:
            pixels = ops.clip(pixels, 0.0, 255.0)
        for layer in self._of_labels:
            mixed = layer({"images": pixels, "labels": targets}, training=True)
            pixels, targets = mixed["images"], mixed["labels"]
        return pixels, targets
