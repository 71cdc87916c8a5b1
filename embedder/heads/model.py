"""A model: a trained head, with the recipe of the features it wants; saved without pickle."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from embedder.backbones import check_arrays_of_archive
from embedder.errors import ModelError, RecipeError, RecipeMismatch
from embedder.files import local_path, os_errors_as, regular
from embedder.heads.calibration import probabilities_of
from embedder.heads.keras_head import KerasHead
from embedder.heads.model_folder import HEAD_FILES, MODEL_FILE, HeadFile, ModelFolder, Record
from embedder.recipe import Recipe
from embedder.store import Store, scan, vectors_of

_LEAST_PROBABILITY = 1e-4  # of a class that none of the nearest neighbours has
# What a head may hold besides what skops trusts of scikit-learn and NumPy: our own estimators.
TRUSTED_TYPES = (
    "embedder.heads.centroid_head.CentroidHead",
    "embedder.heads.ridge_head.RidgeHead",
)
# Modules of heads that were saved by version 0.1.0, and where they are now.
_MOVED = {
    b'"embedder.centroid"': b'"embedder.heads.centroid_head"',
    b'"embedder.ridge"': b'"embedder.heads.ridge_head"',
}


@dataclass(frozen=True)
class Model:
    """A head that turns features of one recipe into calibrated probabilities.

    Attributes:
        estimator: Fitted: a scikit-learn estimator, or a `KerasHead`.
        recipe: What its features are made with.
        column: Which feature, where a store has several.
        classes: (n_classes,) str, in the order of the probabilities.
        temperature: What logits are divided by; see `heads.fit_temperature`.
        thresholds: If multi-label, (n_classes,) the probability above which each
            label is given; None where each image has one.
        head: Its kind, as in `heads.HEADS`.
        settings: What was chosen for it.
        head_sha256: Of the head's file; empty before it is saved.
        record: How it was trained; None of one that `train` did not make.
        accuracy: On the images that it was tested on, where it was loaded with its metrics.
    """

    estimator: Any
    recipe: Recipe
    column: str
    classes: NDArray[np.str_]
    temperature: float
    thresholds: NDArray[np.float64] | None
    head: str
    settings: dict[str, Any]
    head_sha256: str = ""
    record: Record | None = None
    accuracy: float | None = None

    def __repr__(self) -> str:
        """Its head and its backbone, how many classes it tells apart, and how well."""
        known = "" if self.accuracy is None else f", accuracy {self.accuracy:.3f}"
        num_classes = f"{len(self.classes):,} classes"
        return f"<Model {self.head} on {self.recipe.backbone}: {num_classes}{known}>"

    @property
    def is_multilabel(self) -> bool:
        """Whether an image can have several labels (multi-label)."""
        return self.thresholds is not None

    def recorded(self) -> Record:
        """How it was trained.

        Raises:
            ModelError: Nobody knows.
        """
        if self.record is None:
            raise ModelError(
                f"{MODEL_FILE} must say how the model was trained, as of one that `embedder train` "
                f"made. Train it again"
            )
        return self.record

    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Logits (n, n_classes), not yet calibrated, of features (n, dim)."""
        return logits_of(self.estimator, features)

    def logits_of_columns(self, vectors: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """As `logits`, of a recipe's vectors (n, dim) by column, in any stored data type."""
        return self.logits(vectors[self.column].astype(np.float32))

    def logits_recipe(self, folder: str | os.PathLike[str]) -> Recipe:
        """The recipe of this model's logits, made from pixels; `folder` is where it was loaded."""
        head = {"head": self.head_sha256, "head_source": str(Path(folder).absolute()), "views": 1}
        return self.recipe.model_copy(update=head)

    def probabilities(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Calibrated probabilities (n, n_classes) of features (n, dim)."""
        return self.calibrated(self.logits(features))

    def calibrated(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities (n, n_classes) of `logits`."""
        return probabilities_of(logits, self.temperature, self.is_multilabel)

    def chosen(self, probabilities: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Which classes are given to each image: bool (n, n_classes)."""
        if self.thresholds is not None:
            return np.asarray(probabilities > self.thresholds)
        return np.asarray(probabilities.argmax(axis=1)[:, None] == np.arange(len(self.classes)))

    def check_recipe(self, recipe: Recipe, where: str) -> None:
        """Refuse features that were made otherwise than those it was trained on.

        Raises:
            RecipeMismatch: Their recipes differ in what decides a vector.
        """
        differences = [
            line
            for line in self.recipe.differences(recipe)
            if line.split(":")[0] not in ("views", "layers")
        ]
        if self.column not in recipe.columns:
            differences.append(f"feature: {self.column}, not {', '.join(recipe.columns)}")
        if differences:
            raise RecipeMismatch(
                f"The model was trained on features of another recipe than {where}. The model has "
                f"{'; '.join(differences)}. Extract the images with the model's recipe, or train "
                f"another model"
            )

    def save(
        self, folder: str | os.PathLike[str], place: str | os.PathLike[str] | None = None
    ) -> None:
        """Write `model.json` and the head, `head.skops` or `head.keras`, into a folder.

        Args:
            folder: The folder.
            place: Where it will be, if not there.

        Raises:
            ModelError: The folder cannot be written.
        """
        path, place = local_path(folder), local_path(place or folder)
        with os_errors_as(ModelError, f"The model {place} cannot be written"):
            path.mkdir(parents=True, exist_ok=True)
            head: dict[str, Any] = {"kind": self.head, "settings": self.settings}
            if isinstance(self.estimator, KerasHead):
                file = path / HEAD_FILES["keras"]
                self.estimator.save(file)
                head["keras"] = self.estimator.to_json()
            else:
                file = path / HEAD_FILES["skops"]
                import skops.io

                skops.io.dump(self.estimator, file)
            head |= {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            content = {
                "recipe": self.recipe.model_dump(mode="json"),
                "fingerprint": self.recipe.fingerprint,
                "weights_source": self._weights_source_in(place),
                "column": self.column,
                "head": head,
                "classes": self.classes.tolist(),
                "temperature": self.temperature,
                "thresholds": None if self.thresholds is None else self.thresholds.tolist(),
            }
            ModelFolder(path).write_description(content, self.record)

    def _weights_source_in(self, folder: Path) -> str:
        """Where the weights are; of a file in the model's own folder its name, so it can move."""
        source = Path(self.recipe.weights_source)
        return source.name if source.parent == folder.absolute() else str(source)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Model":
        """Open a model that `save` wrote; no code in its files is run.

        Raises:
            ModelError: There is none, its files do not fit together, or its head holds types that
                are not trusted.
        """
        path = local_path(folder)
        said, record = ModelFolder(path).read_description()
        source = said.weights_source
        if source and (path / source).is_file():
            source = str((path / source).absolute())
        try:
            recipe = Recipe(**said.recipe | {"weights_source": source})
        except (RecipeError, TypeError) as error:
            raise ModelError(f"`recipe` of {path / MODEL_FILE}: {error}") from error
        if said.fingerprint != recipe.fingerprint or said.column not in recipe.columns:
            raise ModelError(
                f"`fingerprint` and `column` of {path / MODEL_FILE} must be of its recipe: "
                f"{recipe.fingerprint} and {', '.join(recipe.columns)}. Received: "
                f"{said.fingerprint} and {said.column}"
            )
        accuracy = None
        with suppress(ModelError):  # it predicts without its metrics too
            accuracy = ModelFolder(path).read_metrics()["test"]["accuracy"]
        return cls(
            estimator=_load_head(path, said.head, len(said.classes)),
            recipe=recipe,
            column=said.column,
            classes=np.array(said.classes, dtype=np.str_),
            temperature=said.temperature,
            thresholds=None if said.thresholds is None else np.array(said.thresholds, np.float64),
            head=said.head.kind,
            settings=said.head.settings,
            head_sha256=said.head.sha256,
            record=record,
            accuracy=accuracy,
        )


def _load_head(folder: Path, head: HeadFile, num_classes: int) -> Any:
    file = folder / head.file
    try:
        content = regular(file).read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a model: it has no {file.name}") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != head.sha256:
        raise ModelError(f"{file} is not the head that {MODEL_FILE} names: its sha256 is another")
    if file.suffix == ".keras":
        estimator = KerasHead.load(file, head.keras)
    else:
        check_arrays_of_archive(content, file)
        estimator = _loaded(content, file)
    try:
        nothing = np.zeros((1, estimator.n_features_in_), np.float32)
        num_values = logits_of(estimator, nothing).shape[1]
    except Exception as error:  # of an estimator that anybody may have edited
        raise ModelError(f"{file} is not a head that was fitted: {error}") from error
    if num_values != num_classes:
        raise ModelError(
            f"A head of {num_classes} classes must give {num_classes} values for an image. "
            f"Received: {file}, which gives {num_values}"
        )
    return estimator


def _loaded(content: bytes, file: Path) -> Any:
    """The estimator of a file of skops, if it holds nothing but what is trusted."""
    import skops.io  # all of scikit-learn, which takes seconds, and a Keras head does not need it

    try:
        content = _moved(content)
        untrusted = set(skops.io.get_untrusted_types(data=content)) - set(TRUSTED_TYPES)
        if not untrusted:
            return skops.io.loads(content, trusted=list(TRUSTED_TYPES))
    except Exception as error:  # skops raises what its many parts raise
        raise ModelError(f"{file} cannot be read: {error!r}") from error
    raise ModelError(
        f"A head may hold types of scikit-learn and NumPy, and {', '.join(TRUSTED_TYPES)}. "
        f"Received: {file} with {', '.join(sorted(untrusted))}"
    )


def _moved(content: bytes) -> bytes:
    """A file of skops that names our modules as they are named now."""
    with ZipFile(BytesIO(content)) as archive:
        schema = archive.read("schema.json")
        if not any(name in schema for name in _MOVED):
            return content
        for old, new in _MOVED.items():
            schema = schema.replace(old, new)
        renamed = BytesIO()
        with ZipFile(renamed, "w") as copy:
            for name in archive.namelist():
                copy.writestr(name, schema if name == "schema.json" else archive.read(name))
    return renamed.getvalue()


def read_logits(
    estimator: Any, store: Store, column: str, rows: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Logits (m, n_classes) of some images of a store, read a shard at a time.

    Args:
        estimator: As in `logits_of`.
        store: Features.
        column: Which.
        rows: (m,), indices in `store.ids()`, rising.
    """
    parts = (vectors_of(table[column]) for table in scan(store, [column], images=rows))
    return np.concatenate([logits_of(estimator, part.astype(np.float32)) for part in parts])


def logits_of(estimator: Any, features: NDArray[np.floating]) -> NDArray[np.float32]:
    """Logits (n, n_classes) of any fitted classifier, two classes too.

    Its `decision_function`; of one that has only probabilities, such as k nearest neighbours,
    their logarithm.
    """
    if not hasattr(estimator, "decision_function"):
        probabilities = estimator.predict_proba(features)
        clipped = np.maximum(probabilities, _LEAST_PROBABILITY)
        return np.asarray(np.log(clipped), dtype=np.float32)
    logits: NDArray[np.float32] = np.asarray(estimator.decision_function(features), np.float32)
    if logits.ndim == 1:  # scikit-learn's way with two classes: the second one's
        return np.stack([np.zeros_like(logits), logits], axis=1)
    return logits
