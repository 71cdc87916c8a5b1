import os
from collections.abc import Sequence
from typing import Any, Literal

from embedder.checks import Check
from embedder.errors import EmbedderError as EmbedderError
from embedder.extraction import OnProgress
from embedder.finetuning import Tuned
from embedder.heads import Model
from embedder.inference import EvaluationResult, Exported, ExportFormat, Predictions
from embedder.store import Store as Store
from embedder.training import HeadName, TrainedHead

__version__: str

def extract(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    backbone: str = "efficientnet-lite0",
    weights: str | None = None,
    layers: tuple[str, ...] | None = None,
    pooling: Literal["avg", "max", "gem", "flatten", "none"] | None = None,
    image_size: tuple[int, int] | None = None,
    crop: Literal["center", "squash", "pad"] | None = None,
    crop_fraction: float | None = None,
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None,
    decode: Literal["exact", "scaled"] | None = None,
    precision: Literal["float32", "bfloat16", "float16"] | None = None,
    store_dtype: Literal["float32", "float16"] | None = None,
    l2_normalise: bool | None = None,
    views: int | None = None,
    engine: Literal["auto", "openvino", "tensorflow", "jax"] = "auto",
    batch_size: int | None = None,
    shard_size: int = 1024,
    workers: int | None = None,
    decoders: int | None = None,
    decode_timeout: float = 60.0,
    read_ahead: int = 64,
    allow_private: bool = False,
    scheduler: str | None = None,
    part: str | None = None,
    limit: int | None = None,
    max_failures: float = 0.1,
    retry_failed: bool = False,
    prune: bool = False,
    prune_share: float = 0.1,
    repair: bool = False,
    wait: bool = False,
    quiet: bool = False,
    on_progress: OnProgress | None = None,
) -> Store:
    """Embed the images of a source into a store; what the store has already is not done again.

    Args:
        source: A folder, a glob, a manifest or a URL; see `sources.list_images`.
        store: Folder of the store; made if it does not exist.
        backbone: Name of a network, as `embedder backbones` lists them; capitals, - and _ make no
            difference. Or hub:PRESET, an image network of KerasHub with weights of its own.
        weights: imagenet (the published ones, and the default), a .weights.h5, .h5 or .keras file,
            or random[:SEED]. A .keras file brings a network of its own, whose pixels are
            preprocessed as the backbone's.
        layers: Layers whose output is taken, a column each; the last feature map if none.
        pooling: How a feature map becomes one vector: the mean or the largest of each channel,
            their generalised mean of power 3 (gem, arXiv 1711.02512), all values one after the
            other (flatten), or not at all (none).
        image_size: What the network sees, as (height, width), in pixels.
        crop: Keep the central part in the image's own proportions (center), resize the whole image
            and change its proportions (squash), or fit it in and fill the rest with black (pad).
        crop_fraction: Of center: side of the crop, as a share of the largest crop that fits.
        interpolation: Filter of the antialiased resize.
        decode: Decode large JPEG files at 1/2, 1/4 or 1/8 of their size, but never at less than
            twice the image size, and resize with vector instructions (scaled); or decode every
            pixel and resize with Pillow (exact).
        precision: Arithmetic of the network, whose vectors leave it as float32. bfloat16 and
            float16 need a device that has them.
        store_dtype: Data type of the stored vectors.
        l2_normalise: Whether vectors are divided by their Euclidean length.
        views: Vectors of each image: of the image as it is, and of random parts of it, perhaps
            mirrored, in other colours.
        engine: What runs the network; auto takes jax or tensorflow, whichever can use the GPU and
            is faster, and openvino where there is no GPU.
        batch_size: Images in a batch. If not given, the smallest at which the engine is as fast as
            it gets: measured by the first run that is long enough to gain by it, and remembered.
        shard_size: Images in a shard: the unit of work, of output and of what a crash can lose. Its
            vectors are in memory until it is written; with several views there are as many more.
        workers: Local worker processes, where 1 works within this process. If not given, one per
            GPU, or 1 where there is none.
        decoders: Processes of each worker that read and decode images. If not given, one for each
            of the worker's cores.
        decode_timeout: Seconds that it may take to read one image from a disk, or to decode it. An
            image that takes longer is a failure. Servers and buckets have limits of their own.
        read_ahead: Images that a worker reads at once, at most, where reading is slow: from
            servers, buckets and network disks. They are in memory until they are decoded.
        allow_private: Follow a server's redirect to a private address, such as one of this machine
            or of a local network. If not given, such an image cannot be read.
        scheduler: Address of a running Dask scheduler, whose workers do the work. If not given,
            workers on this machine do.
        part: Embed one part of the source only, given as I/N: 3/16 is the third of 16 parts. Runs
            of different parts, of the same N, may fill one store at the same time. Which part an
            image is in depends on its id alone. If not given, the whole source.
        limit: Only the first so many images of the source, or of the part. If not given, all.
        max_failures: Share of the source's images, or of the part's, 0 to 1, that may fail.
        retry_failed: Try all images again that failed before, though unchanged; those whose trouble
            may have passed always are.
        prune: Drop rows of images that the source no longer has; with a part, its own.
        prune_share: Share of the store's images, 0 to 1, up to which prune drops any: more are gone
            where a disk is missing than where images were deleted.
        repair: Put damaged shards aside and make them again; not with a part, as they hold images
            of others.
        wait: Wait until another run that writes the store ends; else 10 seconds.
        quiet: Whether nothing is shown of how far it is, on a terminal or in a notebook.
        on_progress: Called with how far it is, in place of showing it: often, from several
            threads, with the same object.

    Returns:
        The store, of which every image of the source is now a row or a failure.

    Raises:
        RequestError: The request makes no sense.
        SourceError: The source is missing, empty or unreadable.
        StoreError: The store cannot be written, was made with another recipe, or is being written
            by another run.
        Unfinished: Too many images failed, or the disk is full; what is done is kept.
    """

def train(
    store: Store | str | os.PathLike[str],
    labels: str = "folder",
    head: HeadName = "logistic",
    *,
    split: str = "0.2",
    duplicates: float | None = 0.9,
    class_weight: Literal["balanced"] | None = None,
    separator: str | None = None,
    column: str | None = None,
    coarse: str | None = None,
    unlabelled: str | None = None,
    unlabelled_method: Literal["self-training", "label-spreading"] = "self-training",
    seed: int = 0,
) -> TrainedHead:
    """Train a head on a store's features, and test it on images it has not seen.

    Args:
        store: Features.
        labels: `folder`, `parent`, `FILE.csv:COLUMN`, `LIST.txt:NUMBER` or `column:NAME`; see
            `datasets.read_training_set`.
        head: The kind of classifier.
        split: Share to test on, kfold:K, a folder with train.txt, test.txt (and val.txt),
            FILE.csv:COLUMN or column:NAME.
        duplicates: Cosine from which two images count as near-duplicates, which never stand on both
            sides of a split; none takes every image for itself.
        class_weight: balanced: rare classes count as much as frequent ones.
        separator: What separates several labels of one image, such as ;
        column: Which feature, of several.
        coarse: Labels of a coarser level, spelled as labels, to score on both levels.
        unlabelled: A store whose images help without labels.
        unlabelled_method: How they help.
        seed: Of all that is random.

    Returns:
        The trained head; its `save` writes the model's folder, that the other functions take.

    Raises:
        RequestError: The request makes no sense, or the labels name fewer than two classes.
        SourceError: A label file or a list cannot be read.
        StoreError: The store has no rows.
    """

def evaluate(
    model: str | os.PathLike[str],
    store: Store | str | os.PathLike[str],
    labels: str = "folder",
    coarse: str | None = None,
    include_trained: bool = False,
) -> EvaluationResult:
    """Test a model on the labelled images of a store that it was not trained on.

    Args:
        model: Its folder.
        store: Features of the model's recipe.
        labels: As in `train`.
        coarse: Labels of a coarser level, spelled alike, for a score on both.
        include_trained: Whether images it was trained on count too.

    Returns:
        Its metrics, and which rows were left out.

    Raises:
        ModelError: There is no such model.
        RecipeMismatch: The features are of another recipe.
        RequestError: The request makes no sense, or nothing is left to test on.
    """

def predict(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    top_k: int = 5,
    store: str | None = None,
    *,
    engine: Literal["auto", "openvino", "tensorflow", "jax"] = "auto",
    batch_size: int | None = None,
    shard_size: int = 1024,
    workers: int | None = None,
    decoders: int | None = None,
    decode_timeout: float = 60.0,
    read_ahead: int = 64,
    allow_private: bool = False,
    scheduler: str | None = None,
    part: str | None = None,
    limit: int | None = None,
    max_failures: float = 0.1,
    retry_failed: bool = False,
    prune: bool = False,
    prune_share: float = 0.1,
    repair: bool = False,
    wait: bool = False,
    quiet: bool = False,
    on_progress: OnProgress | None = None,
) -> Predictions:
    """Predict the classes of images, or of a store's rows, and write them to one Parquet file.

    Args:
        model: Its folder.
        source: A store, or images as `extract` takes them.
        out: The file, a row for each image; its columns are described in `inference.predict`.
        top_k: How many of the most probable classes to write.
        store: Store to keep the features of the images in; None to keep their logits alone, hidden
            beside `out`.
        engine: What runs the network; auto takes jax or tensorflow, whichever can use the GPU and
            is faster, and openvino where there is no GPU.
        batch_size: Images in a batch. If not given, the smallest at which the engine is as fast as
            it gets: measured by the first run that is long enough to gain by it, and remembered.
        shard_size: Images in a shard: the unit of work, of output and of what a crash can lose. Its
            vectors are in memory until it is written; with several views there are as many more.
        workers: Local worker processes, where 1 works within this process. If not given, one per
            GPU, or 1 where there is none.
        decoders: Processes of each worker that read and decode images. If not given, one for each
            of the worker's cores.
        decode_timeout: Seconds that it may take to read one image from a disk, or to decode it. An
            image that takes longer is a failure. Servers and buckets have limits of their own.
        read_ahead: Images that a worker reads at once, at most, where reading is slow: from
            servers, buckets and network disks. They are in memory until they are decoded.
        allow_private: Follow a server's redirect to a private address, such as one of this machine
            or of a local network. If not given, such an image cannot be read.
        scheduler: Address of a running Dask scheduler, whose workers do the work. If not given,
            workers on this machine do.
        part: Embed one part of the source only, given as I/N: 3/16 is the third of 16 parts. Runs
            of different parts, of the same N, may fill one store at the same time. Which part an
            image is in depends on its id alone. If not given, the whole source.
        limit: Only the first so many images of the source, or of the part. If not given, all.
        max_failures: Share of the source's images, or of the part's, 0 to 1, that may fail.
        retry_failed: Try all images again that failed before, though unchanged; those whose trouble
            may have passed always are.
        prune: Drop rows of images that the source no longer has; with a part, its own.
        prune_share: Share of the store's images, 0 to 1, up to which prune drops any: more are gone
            where a disk is missing than where images were deleted.
        repair: Put damaged shards aside and make them again; not with a part, as they hold images
            of others.
        wait: Wait until another run that writes the store ends; else 10 seconds.
        quiet: As in `extract`.
        on_progress: As in `extract`.

    Returns:
        The file, and how many images it has.

    Raises:
        ModelError: There is no such model.
        RecipeMismatch: The store's features are of another recipe than the model's.
        EmbedderError: As in `extract`.
    """

def finetune(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    activations: str | os.PathLike[str] | None = None,
    strategy: Literal[
        "head", "gradual", "full", "partial", "norm", "bias", "cut", "scratch"
    ] = "gradual",
    epochs: int | None = None,
    batch_size: int = 32,
    learning_rate: float | None = None,
    rate_decay: float | None = None,
    optimizer: str | None = None,
    weight_decay: float = 0.0001,
    label_smoothing: float = 0.1,
    class_weight: Literal["balanced"] | None = None,
    unlabelled: str | None = None,
    augment: tuple[
        Literal["flip", "vertical-flip", "crop", "rotation", "colour", "mixup", "cutmix"], ...
    ]
    | None = None,
    views: int | None = None,
    cut: str | None = None,
    from_pixels: bool = False,
    blocks: tuple[str, ...] = (),
    fraction: float = 0.05,
    importance: Literal["taylor", "fisher"] = "taylor",
    auxiliary: str | None = None,
    loss_weights: tuple[float, float] = (1.0, 10.0),
    pooling: Literal["avg", "max", "gem", "flatten"] | None = None,
    hidden: int | None = None,
    dropout: float | None = None,
    train_norm: bool = False,
    ema: float | None = None,
    patience: int = 5,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    seed: int = 0,
    engine: Literal["auto", "openvino", "tensorflow", "jax"] = "auto",
    workers: int | None = None,
    quiet: bool = False,
    on_progress: OnProgress | None = None,
) -> Tuned:
    """Train a model's backbone and head further, and test it on the images the model was tested on.

    Args:
        model: Its folder: a head on frozen features, or a tuned model.
        source: The images it was trained on, as `extract` takes them.
        out: Folder to write the tuned model to; its features go beside it, to `out`.features.
        activations: Of head and cut: store of the activations, to make or to take.
        strategy: Which weights are trained, and from which head on.
        epochs: The most there can be.
        batch_size: Images of a step.
        learning_rate: Of the head, at its highest.
        rate_decay: Factor of the rate from a group of blocks to the one below, to 1.
        optimizer: Name of a Keras optimizer, such as adamw or sgd.
        weight_decay: Of kernels, apart from the gradient, in units of the learning rate.
        label_smoothing: Share of a target, 0 to below 1.
        class_weight: balanced: rare classes count as much as frequent ones.
        unlabelled: Images without labels, as extract takes them, that get pseudo-labels from the
            model where its guard finds that they help it.
        augment: Where training is from pixels; flip if absent.
        views: Of head and cut: views an image, 4 if absent.
        cut: Of cut: the lowest block that is trained, such as conv5; found by itself if absent.
        from_pixels: Of head and cut: compute what is below anew in each epoch.
        blocks: Of partial: blocks to choose channels in; those above the cut if none.
        fraction: Of partial: share of the channels, above 0 to 1.
        importance: Of partial: by what it chooses channels.
        auxiliary: Layer whose pooled output gets a classifier of its own, in training only.
        loss_weights: Of the losses of the auxiliary and the main classifier.
        pooling: Of a new head's features; the model's if absent.
        hidden: Of a new head: units of its hidden layer, 0 for none.
        dropout: Of a new head, 0 to below 1.
        train_norm: Train BatchNormalization's statistics too.
        ema: Momentum of the average of the weights to keep, 0 to below 1.
        patience: Epochs without gain before the end.
        precision: Of training; auto is bfloat16 on GPUs that have it.
        seed: Of all that is random.
        engine: What runs the network; auto takes jax or tensorflow, whichever can use the GPU and
            is faster, and openvino where there is no GPU.
        workers: Local worker processes, where 1 works within this process. If not given, one per
            GPU, or 1 where there is none.
        quiet: As in `extract`.
        on_progress: As in `extract`; after an epoch, with what it came to as the `phase`.

    Returns:
        The tuned model, and whether it paid.

    Raises:
        RequestError: The request makes no sense.
        ModelError: The model cannot be read, or `out` holds something else.
        SourceError: The source cannot be listed.
        EngineError: Neither TensorFlow nor JAX can train here.
        Unfinished: Training diverged, or images are no longer what they were.
    """

def compare(models: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Put models side by side, on the images that all of them were tested on.

    Args:
        models: Their folders; the first is what the others are compared with.

    Returns:
        For each: `model`, `accuracy` with its interval, `against_first` (gain, McNemar's test),
        `verdict` in words and more, as `embedder compare --json` writes it.

    Raises:
        ModelError: One of them is no model, or was not tested on images of its own.
        RequestError: They were not tested on the same images.
    """

def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    file_format: ExportFormat,
    source: str | os.PathLike[str] | None = None,
    num_images: int = 16,
    *,
    quiet: bool = False,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Write a model as one network from pixels to probabilities, which runs without this package.

    Args:
        model: Its folder.
        out: Folder to write; what is in it is described in `inference.export`.
        file_format: Whose runtime is to run it.
        source: Images to compare on, as `extract` takes them; None for those of the training.
        num_images: How many of them.
        quiet: As in `extract`.
        on_progress: As in `extract`.

    Returns:
        Where it is, and how far it is from what `predict` gives.

    Raises:
        ModelError: There is no such model, or `out` holds something else or cannot be written.
        RequestError: The request makes no sense.
        Unfinished: The format cannot hold the network, or computes something else.
    """

def verify(
    store: Store | str | os.PathLike[str],
    source: str | None = None,
    audit: int = 0,
    seed: int = 0,
    *,
    allow_private: bool = False,
) -> list[Check]:
    """Check that every row of a store is whole and unique, and that vectors are their images'.

    Args:
        store: The store.
        source: Where its images are, to compare with.
        audit: Number of random images that are embedded again, one by one.
        seed: Of the choice.
        allow_private: Whether servers may redirect to private addresses, such as those of a local
            network.

    Returns:
        All checks, passed or not.

    Raises:
        SourceError: The source is missing or empty, or none is known for an audit.
        RequestError: `audit` is negative.
    """

def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store that is there.

    Raises:
        StoreError: There is none.
    """

def load_model(path: str | os.PathLike[str]) -> Model:
    """Load a model from its folder.

    Raises:
        ModelError: There is none, or it cannot be read safely.
    """

def list_backbones() -> list[str]:
    """Names of the networks, as `backbone` takes them; `backbones.BACKBONES` has their facts."""
