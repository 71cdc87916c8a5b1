"""Fine-tuning: a model's backbone and head trained further, and compared with what it was."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedder.backbones import dtype_policy, is_preset, load_network, tapped_tensors
from embedder.columns import EMBEDDING
from embedder.datasets import TrainingSet
from embedder.errors import RequestError
from embedder.evaluation import accuracy_in_words
from embedder.extraction import OnProgress, RunOptions, run_extraction
from embedder.files import local_path
from embedder.finetuning import scratch_network as scratch
from embedder.finetuning.augmentation import Augmenter
from embedder.finetuning.blocks import find_cut
from embedder.finetuning.device import prepare_device, training_precision
from embedder.finetuning.initial_head import check_start, starting_model, with_head_features
from embedder.finetuning.inputs import Examples, decode_pixels, examples_of, read_activations
from embedder.finetuning.labelled_images import find_paths, read_labelled
from embedder.finetuning.network import FEATURES, TrainableNetwork, make_trainable, seed_layers
from embedder.finetuning.options import SCRATCH, Augmentation, TuneOptions
from embedder.finetuning.parameter_groups import num_tuned, plan_groups, tuned_blocks
from embedder.finetuning.pseudo_labels import PseudoLabelledImages, add_pseudo_labels
from embedder.finetuning.resume import TUNED_FEATURES, done_before, finish, open_work, request_of
from embedder.finetuning.schedule import find_optimizer
from embedder.finetuning.trainer import Epoch, train
from embedder.finetuning.tuned_model import (
    Tuning,
    activations_recipe,
    judge_tuned,
    save_backbone,
    tuned_recipe,
)
from embedder.heads import BACKBONE_FILES, Model, ModelFolder, as_keras_layers, classifier_layers
from embedder.libraries import import_keras
from embedder.machine import gpus
from embedder.sources import Listing, list_images
from embedder.store import Store
from embedder.training import Stopwatch, TrainedHead

if TYPE_CHECKING:
    import keras

_DEFAULT_VIEWS = 4
_DEFAULT_AUGMENT: tuple[Augmentation, ...] = ("flip",)
_NUM_CHECKED = 8  # all of their activations are in memory at once


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model.

    Attributes:
        path: Its folder.
        metrics: As in its `metrics.json`.
        head: With what its report is made of; None where it had been made before.
    """

    path: Path
    metrics: dict[str, Any]
    head: TrainedHead | None

    def __repr__(self) -> str:
        """Where it is, how it was tuned, and how good it is and was before."""
        tuning = self.metrics["tuning"]
        return (
            f"<Tuned {self.path}: {tuning['strategy']}, {accuracy_in_words(self.metrics)}, "
            f"{tuning['accuracy_before']:.3f} before>"
        )


@dataclass(frozen=True)
class Watcher:
    """What is called while a model is fine-tuned.

    Attributes:
        run: During extractions, as `extraction.run_extraction`'s `on_progress`.
        epoch: After each epoch.
        head: With the tuned model, its metrics, the folder that is yet to take its place, and what
            the source holds, such as to write a report.
    """

    run: OnProgress = lambda _: None
    epoch: Callable[[Epoch], None] = lambda _: None
    head: Callable[[TrainedHead, dict[str, Any], Path, Listing], None] = lambda *_: None


def finetune(
    model_path: str | os.PathLike[str],
    source: str | os.PathLike[str] | Listing,
    out: str | os.PathLike[str],
    options: TuneOptions | None = None,
    run_options: RunOptions | None = None,
    activations: str | os.PathLike[str] | None = None,
    watch: Watcher | None = None,
) -> Tuned:
    """Train a model's backbone and head further, and test it on the images the model was tested on.

    The tuned model is written as `train` writes one, its backbone's weights beside its head, so
    that `predict`, `evaluate` and `export` take it. Features of all images of the source are
    extracted again, with the tuned backbone, into the store `OUT.features`. What is needed to go on
    after a kill is in `OUT.tuning`, and goes at the end; an older model is whole until the new one
    takes its place, and then its features' place.

    Args:
        model_path: Folder of the model: a head on frozen features, or a tuned model.
        source: Its images, as `extract` takes them; or what that holds, where it is listed already.
        out: Folder to write.
        options: Strategy and training; None for the defaults.
        run_options: Workers, engine and shard size of the extractions; None for the defaults.
        activations: Store of the activations at the cut, to make or to take; None for one that
            goes at the end.
        watch: What is called meanwhile.

    Raises:
        RequestError: The request makes no sense.
        ModelError: The model cannot be read, or OUT holds something else.
        SourceError: The source cannot be listed.
        EngineError: Neither TensorFlow nor JAX can train here.
        Unfinished: Training diverged, or images are no longer what they were.
    """
    prepare_device(gpus())
    options = options or TuneOptions()
    # However many images could not be embedded, those with a label could, and are looked for.
    run_options = replace(run_options or RunOptions(), max_failures=1.0)
    model, folder = Model.load(model_path), local_path(out)
    whole = folder.absolute()
    work, features = (whole.with_name(f"{whole.name}.{name}") for name in ("tuning", "features"))
    cache = work / "activations" if activations is None else local_path(activations)
    labelled = read_labelled(model_path, model, options.seed)
    request = request_of(model, labelled, options)
    if (done := done_before(folder, request)) is not None:
        finish(work, request, folder, features)
        return Tuned(folder, done, None)
    _check(model, Path(model_path), folder, features, options)
    listing = source if isinstance(source, Listing) else list_images(source)
    paths = find_paths(listing, labelled)
    job = _Job(model, labelled, options, run_options, work, watch or Watcher())
    tunable = job.make_tunable()
    open_work(work, request)
    more = job.find_start(listing)
    if more is not None:
        paths += more.paths
    tunable, examples = job.prepare(tunable, listing, paths, cache)
    epochs = job.train(tunable, examples)
    recipe = save_backbone(tunable.network, job.recipe, options, work)
    # The weights stay where they are until all is made of them that the model is to hold.
    run_extraction(listing, {str(work / TUNED_FEATURES): recipe}, run_options, job.watch.run)
    job.stopwatch.lap("features")
    weights = Path(recipe.weights_source)
    tuning = Tuning(
        model=Path(model_path),
        weights=whole / weights.name,
        features=features,
        options=options,
        request=request,
        epochs=epochs,
        num_tuned=job.num_tuned,
        num_weights=tunable.network.count_params(),
        seconds=job.stopwatch.seconds,
        pseudo_labels=None if more is None else more.head.facts(),
    )
    head = judge_tuned(tunable.head, model, labelled, Store(work / TUNED_FEATURES), tuning)
    head = replace(head, pseudo_labels=_pseudo_labels(model, Path(model_path), more))
    metrics = head.save(
        folder, lambda new, metrics: job.watch.head(head, metrics, new, listing), weights
    )
    finish(work, request, folder, features)
    return Tuned(folder, metrics, replace(head, store=Store(features)))


def _pseudo_labels(model: Model, path: Path, more: PseudoLabelledImages | None) -> pa.Table | None:
    """Pseudo-labels that the weights have learned from, so that `evaluate` knows of them."""
    is_tuned = model.recorded().tuning is not None
    older = ModelFolder(path).read_pseudo_labels() if is_tuned else None
    newer = None if more is None else more.head.pseudo_labels()
    tables = [table for table in (newer, older) if table is not None]
    return pa.concat_tables(tables) if tables else None


def _check(model: Model, path: Path, folder: Path, features: Path, options: TuneOptions) -> None:
    """Refuse what cannot be done before anything is made."""
    ModelFolder(folder).check_free()
    if is_preset(model.recipe.backbone):
        raise RequestError(
            f"Backbones of `embedder backbones` and `.keras` files can be fine-tuned, presets of "
            f"KerasHub cannot. Received: {model.recipe.backbone}"
        )
    if folder.resolve() == path.resolve():
        raise RequestError(f"OUT must be another folder than MODEL. Received: {folder} for both")
    weights = Path(model.recipe.weights_source)
    own = [Path(model.recorded().provenance.store)]
    if weights.name in BACKBONE_FILES:
        own.append(weights.parent)
    if taken := {folder.resolve(), features.resolve()} & {place.resolve() for place in own}:
        raise RequestError(
            f"OUT and OUT.features are written over, and must not hold the weights or the features "
            f"that MODEL is made from. Received: {', '.join(map(str, taken))}"
        )
    if features.exists():
        older = Path(Store(features).recipe.weights_source)
        if older.name not in BACKBONE_FILES:
            raise RequestError(
                f"OUT.features is written over, and must be of an older fine-tuning, or not be "
                f"there. Received: {features}, features of the weights {older}"
            )
    find_optimizer(options.resolved("optimizer"))
    if options.class_weight is not None and model.is_multilabel:
        raise RequestError("Class weights need images of one label each. Received: several")
    if options.kind.keeps_head:
        as_keras_layers(model)  # refuses a head that is not made of layers


@dataclass
class _Job:
    """One fine-tuning, step by step, each timed.

    Attributes:
        model: What is tuned.
        labelled: What it learns from; pseudo-labels are added.
        options: Of the strategy and its training.
        run_options: Of extractions.
        work: The training's folder.
        watch: What is called meanwhile.
    """

    model: Model
    labelled: TrainingSet
    options: TuneOptions
    run_options: RunOptions
    work: Path
    watch: Watcher

    def __post_init__(self) -> None:
        self.start = self.model  # what a head that is kept is taken from
        self.recipe = tuned_recipe(self.model, self.options)
        self.cut: str | None = None
        self.stopwatch = Stopwatch()
        self.num_tuned = 0

    def make_tunable(self) -> TrainableNetwork:
        """The network, whose heads are still to come; refuses what the network has no place for."""
        network = self._network()
        self.cut = self._find_cut(network)
        tunable = make_trainable(self.recipe, EMBEDDING, network, self.cut, self.options.auxiliary)
        tuned_blocks(tunable, self.options)
        self.stopwatch.lap("network")
        return tunable

    def find_start(self, listing: Listing) -> PseudoLabelledImages | None:
        """The head that training starts from, and what it makes of images without labels."""
        options, model = self.options, self.model
        # A tuned model has not seen its validation images.
        is_clean = model.recorded().tuning is not None
        needs_head = options.kind.keeps_head and not is_clean
        if options.unlabelled is None and not needs_head:
            return None
        images = with_head_features(model, self.labelled, listing, self.work, self.run_options)
        if not is_clean:
            self.start = starting_model(model, images)
        more = None
        if options.unlabelled is not None:
            more = add_pseudo_labels(
                self.start, self.labelled, images, options.unlabelled, self.work, self.run_options
            )
            self.labelled = more.labelled
        self.stopwatch.lap("head")
        return more

    def prepare(
        self,
        tunable: TrainableNetwork,
        listing: Listing,
        paths: list[bytes],
        cache: Path,
    ) -> tuple[TrainableNetwork, Examples]:
        """The network with its head, and what it learns from.

        Args:
            tunable: Network without heads.
            listing: The source.
            paths: Where each labelled image is.
            cache: Store of the activations at the cut.
        """
        options, labelled = self.options, self.labelled
        tunable = self._with_heads(tunable)
        inputs: NDArray[Any]
        if not options.is_cached:
            inputs = decode_pixels(paths, labelled, self.recipe, self.work / "pixels.npy")
            self.stopwatch.lap("decode")
        else:
            recipe = activations_recipe(self.recipe, self.cut, options.views or _DEFAULT_VIEWS)
            run_extraction(listing, {str(cache): recipe}, self.run_options, self.watch.run)
            inputs = read_activations(Store(cache), labelled, self.work / "activations.npy")
            self.stopwatch.lap("activations")
        examples = examples_of(
            labelled, self.model, inputs, not options.is_cached, options.class_weight
        )
        if options.kind.keeps_head:
            check_start(tunable, examples.inputs[:_NUM_CHECKED, 0], self.start)
        return tunable, examples

    def _network(self) -> "keras.Model":
        """The backbone that training starts from, in the precision of the training."""
        options, is_scratch = self.options, self.options.strategy == SCRATCH
        precision: str = options.precision
        if not is_scratch and self.recipe.weights_source.endswith(".keras"):
            if precision == "bfloat16":
                raise RequestError(
                    f"A .keras network is trained in the precision that it was saved in. Received: "
                    f"precision={precision} for {self.recipe.weights_source}"
                )
            precision = "float32"
        if precision == "auto":
            precision = training_precision(gpus())
        with dtype_policy(precision):
            if is_scratch:
                return scratch.make_network(self.recipe.image_size, options.seed)
            network = load_network(self.recipe)
            seed_layers(network, options.seed)
            return network

    def _find_cut(self, network: "keras.Model") -> str | None:
        """Where the network is cut; None for training from pixels on."""
        options = self.options
        if options.strategy == "head":
            return FEATURES
        if not options.kind.is_cut:
            return None
        top = tapped_tensors(network, self.recipe)[EMBEDDING]
        return find_cut(network, top, options.cut)

    def _with_heads(self, tunable: TrainableNetwork) -> TrainableNetwork:
        """Add the model's own head, or a new one, and the auxiliary one."""
        options, num_classes = self.options, len(self.model.classes)
        dim = tunable.upper.output["features"].shape[-1]
        if options.kind.keeps_head:
            head = as_keras_layers(self.start)
        else:
            hidden, dropout = options.resolved("hidden"), options.resolved("dropout")
            head = _new_head(dim, num_classes, hidden, dropout, options.seed)
        auxiliary = None
        if options.auxiliary is not None:
            width = tunable.upper.output["auxiliary"].shape[-1]
            auxiliary = _new_head(width, num_classes, 0, 0.0, options.seed + 1)
        return replace(tunable, head=head, auxiliary_head=auxiliary)

    def train(self, tunable: TrainableNetwork, examples: Examples) -> list[Epoch]:
        """Train the network."""
        options = self.options
        groups = plan_groups(tunable, examples, options)
        self.num_tuned = num_tuned(groups)
        augment = () if options.is_cached else options.augment
        augmenter = Augmenter(_DEFAULT_AUGMENT if augment is None else augment, options.seed)
        schedule, checkpoint = options.schedule(), self.work / "checkpoint.npz"
        epochs = train(tunable, groups, examples, schedule, augmenter, checkpoint, self.watch.epoch)
        self.stopwatch.lap("train")
        # Of all epochs, those before a kill too.
        self.stopwatch.seconds["train"] = round(sum(epoch.seconds for epoch in epochs), 3)
        return epochs


def _new_head(
    dim: int, num_classes: int, hidden: int, dropout: float, seed: int
) -> "keras.Sequential":
    """A classifier from random weights: logits of features (batch, dim)."""
    keras = import_keras()
    seeds = np.random.default_rng(seed).integers(2**31, size=3).tolist()
    layers = classifier_layers((hidden,) if hidden else (), dropout, num_classes, seeds)
    return keras.Sequential([keras.Input((dim,)), *layers])
