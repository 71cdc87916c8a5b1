"""How a run is done."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from embedder.options import Name, checked

# At 1,280 float32 a row this is 5 MB a shard: some seconds of work to lose in a crash, and few
# enough files for a million images.
DEFAULT_SHARD_SIZE = 1024
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _part(text: str | None) -> str | None:
    if text is None:
        return None
    from embedder.store import Part

    return str(Part.parse(text))


@checked
class RunOptions:
    """How a run is done; nothing here changes a vector."""

    engine: Annotated[
        Literal["auto", "openvino", "tensorflow", "jax"],
        Field(
            description="What runs the network; auto takes jax or tensorflow, whichever can use "
            "the GPU and is faster, and openvino where there is no GPU."
        ),
    ] = "auto"
    batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            description="Images in a batch. If not given, the smallest at which the engine is as "
            "fast as it gets: measured by the first run that is long enough to gain by it, and "
            "remembered.",
        ),
    ] = None
    shard_size: Annotated[
        int,
        Field(
            ge=1,
            description="Images in a shard: the unit of work, of output and of what a crash can "
            "lose. Its vectors are in memory until it is written; with several views there are as "
            "many more.",
        ),
    ] = DEFAULT_SHARD_SIZE
    workers: Annotated[
        int | None,
        Field(
            ge=1,
            description="Local worker processes, where 1 works within this process. If not given, "
            "one per GPU, or 1 where there is none.",
        ),
    ] = None
    decoders: Annotated[
        int | None,
        Field(
            ge=1,
            description="Processes of each worker that read and decode images. If not given, one "
            "for each of the worker's cores.",
        ),
    ] = None
    decode_timeout: Annotated[
        float,
        Field(
            gt=0.0,
            description="Seconds that it may take to read one image from a disk, or to decode it. "
            "An image that takes longer is a failure. Servers and buckets have limits of "
            "their own.",
        ),
    ] = 60.0
    read_ahead: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="Images that a worker reads at once, at most, where reading is slow: from "
            "servers, buckets and network disks. They are in memory until they are decoded.",
        ),
    ] = 64
    allow_private: Annotated[
        bool,
        Field(
            description="Follow a server's redirect to a private address, such as one of this "
            "machine or of a local network. If not given, such an image cannot be read.",
        ),
    ] = False
    scheduler: Annotated[
        Name | None,
        Field(
            description="Address of a running Dask scheduler, whose workers do the work. If not "
            "given, workers on this machine do."
        ),
    ] = None
    part: Annotated[
        Annotated[Name, AfterValidator(_part)] | None,
        Field(
            description="Embed one part of the source only, given as I/N: 3/16 is the third of 16 "
            "parts. Runs of different parts, of the same N, may fill one store at the same time. "
            "Which part an image is in depends on its id alone. If not given, the whole source.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        Field(
            ge=1,
            description="Only the first so many images of the source, or of the part. If not "
            "given, all.",
        ),
    ] = None
    max_failures: Annotated[
        Share,
        Field(description="Share of the source's images, or of the part's, 0 to 1, that may fail."),
    ] = 0.1
    retry_failed: Annotated[
        bool,
        Field(
            description="Try all images again that failed before, though unchanged; those whose "
            "trouble may have passed always are."
        ),
    ] = False
    prune: Annotated[
        bool,
        Field(
            description="Drop rows of images that the source no longer has; with a part, its own."
        ),
    ] = False
    prune_share: Annotated[
        Share,
        Field(
            description="Share of the store's images, 0 to 1, up to which prune drops any: more "
            "are gone where a disk is missing than where images were deleted."
        ),
    ] = 0.1
    repair: Annotated[
        bool,
        Field(
            description="Put damaged shards aside and make them again; not with a part, as they "
            "hold images of others."
        ),
    ] = False
    wait: Annotated[
        bool,
        Field(description="Wait until another run that writes the store ends; else 10 seconds."),
    ] = False
