"""Weights: where they come from, and whether they are the right ones."""

import hashlib
import importlib.util
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedder.backbones.layers import leaf_layers
from embedder.errors import RecipeError, WeightsError
from embedder.libraries import import_keras, logger

if TYPE_CHECKING:  # Keras takes seconds to import, and most commands do not need it
    import keras

# Names by which `weights` says where to look; anything else is a file.
IMAGENET = "imagenet"
RANDOM = "random"


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that come as a file inside a data-only package.

    Attributes:
        package: Import name of the package; it is located, never imported.
        file: Path inside the package.
        sha256: Of the whole file, 64 hexadecimal digits.
        install: What to give to `pip install` when the package is absent.
    """

    package: str
    file: str
    sha256: str
    install: str

    @property
    def path(self) -> Path | None:
        """Where the file is, or None where the package is not installed."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.file
        return path if path.is_file() else None

    @property
    def how_to_get(self) -> str:
        """How to come by the file, in a few words."""
        return f"pip install '{self.install}'"

    @property
    def advice(self) -> str:
        """How to come by the file."""
        return f"Install them with: {self.how_to_get}"

    def find(self) -> Path:
        """Locate the file and check that it is the published one.

        Raises:
            WeightsError: The package is not installed, or the file's sha256 is another.
        """
        path = self.path
        if path is None:
            raise WeightsError(f"The weights are not installed. {self.advice}")
        if (digest := digest_of(path)) != self.sha256:
            raise WeightsError(
                f"{path} is corrupt: its sha256 must be {self.sha256}. Received: {digest}. "
                f"Install it again: pip install --force-reinstall --no-deps '{self.install}'"
            )
        return path


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that Keras publishes, and downloads into a cache of its own.

    Attributes:
        url: Where the file is.
        file: Its name in Keras's cache.
        digest: Of the whole file, as Keras knows it: MD5 (32 hexadecimal digits) or sha256 (64);
            empty where Keras knows none.
    """

    url: str
    file: str
    digest: str

    @property
    def place(self) -> Path:
        """Where the file is looked for first, and where Keras downloads it to."""
        home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
        return Path(home) / "models" / self.file

    @property
    def path(self) -> Path | None:
        """Where the file is, or None where it has not been downloaded."""
        return self.place if self.place.is_file() else None

    @property
    def how_to_get(self) -> str:
        """How to come by the file, in a few words."""
        return "downloaded by the first run"

    @property
    def advice(self) -> str:
        """How to come by the file."""
        kind = "sha256" if len(self.digest) == 64 else "MD5"
        check = f", which has the {kind} {self.digest}" if self.digest else ""
        return f"Download {self.url}{check}, and put it at {self.place}; or name it with --weights"

    def find(self) -> Path:
        """Locate the file, or download it, and check its hash.

        Raises:
            WeightsError: It cannot be had from the network, or its hash is another.
        """
        path = self.path or self._download()
        kind = "sha256" if len(self.digest) == 64 else "md5"
        if self.digest and (found := digest_of(path, kind)) != self.digest:
            raise WeightsError(
                f"{path} is corrupt: its {kind} must be {self.digest}. Received: {found}. "
                f"Delete it; the next run downloads it again"
            )
        return path

    def _download(self) -> Path:
        keras = import_keras()
        logger.info("downloading %s", self.url)
        try:
            with redirect_stdout(sys.stderr):  # Keras prints how far it is
                found = keras.utils.get_file(
                    self.file, self.url, cache_subdir="models", file_hash=self.digest or None
                )
        # Keras raises `Exception` itself where the server does not answer.
        except Exception as error:
            raise WeightsError(
                f"The weights are not on this machine, and cannot be downloaded: {error}. "
                f"{self.advice}"
            ) from error
        return Path(found)


def digest_of(path: Path, kind: str = "sha256") -> str:
    """Hash of a whole file, in hexadecimal.

    Raises:
        WeightsError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, kind).hexdigest()
    except OSError as error:
        raise WeightsError(
            f"The weights file {path} cannot be read: {error.strerror or error}"
        ) from error


def seed_of(weights: str) -> int | None:
    """The seed that `random` or `random:SEED` names; None for all other weights.

    Raises:
        RecipeError: The seed is not a whole number.
    """
    kind, _, seed = weights.partition(":")
    if kind != RANDOM:
        return None
    if not (seed or "0").isdecimal():
        raise RecipeError(f"`weights` random:SEED wants a whole number. Received: {weights}")
    return int(seed or "0")


def randomise(network: "keras.Model", seed: int) -> None:
    """Draw every kernel anew, from a normal distribution of variance 1 / fan-in.

    Biases and normalisations stay as they are built. The same seed gives the same values with any
    version of Keras. With the usual 2 (arXiv 1502.01852), and no normalisation to hold them, values
    grow to 1e4 in networks with squeeze-and-excitation, whose gates then turn on rounding errors.
    """
    random = np.random.default_rng(seed)
    for layer in leaf_layers(network):
        values = layer.get_weights()
        for number, variable in enumerate(layer.weights):
            if len(variable.shape) > 1 and "kernel" in variable.name:
                is_depthwise = "Depthwise" in type(layer).__name__ or "depthwise" in variable.name
                fan_in = np.prod(variable.shape[: -2 if is_depthwise else -1])
                scale = np.sqrt(1.0 / fan_in)
                values[number] = random.normal(0.0, scale, variable.shape).astype(np.float32)
        layer.set_weights(values)
