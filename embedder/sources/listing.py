"""Where images come from: any kind of source, listed as a table of image refs."""

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from embedder.errors import SourceError
from embedder.sources.folder import is_glob, list_folder, list_glob, mode_of
from embedder.sources.manifest import MANIFEST_EXTENSIONS, list_manifest
from embedder.sources.reading import kind_of_file
from embedder.sources.urls import scheme_of


@dataclass(frozen=True)
class Listing:
    """What a source holds.

    Attributes:
        refs: Table of `REF_SCHEMA`, then any extra columns of a manifest; sorted by `image_id`,
            which is unique.
        skipped: Number of files that do not have the extension of an image format, by extension.
        num_repeated: Lines of a manifest that name a path again.
        source: What was listed, as it was given.
    """

    refs: pa.Table
    skipped: Counter[str] = field(default_factory=Counter)
    num_repeated: int = 0
    source: str = ""

    def paths(self) -> dict[str, bytes]:
        """Where each image is, by its id."""
        return dict(
            zip(self.refs["image_id"].to_pylist(), self.refs["path"].to_pylist(), strict=True)
        )


def list_images(source: str | os.PathLike[str]) -> Listing:
    """List the images of a source, in a stable order.

    Args:
        source: A folder (recursive; files with the extension of an image format, in any case;
            links to files are followed, links to folders are not), a glob, a manifest, or the
            URL of a folder, such as `s3://bucket/photos`. A manifest is a `.txt` with one path a
            line, or a `.csv` or `.parquet` with a `path` column; its paths are relative to its
            folder, absolute, or URLs. Columns of a CSV are carried as text, as they are written.

    Raises:
        SourceError: The source is missing, holds no image, or cannot be listed.
    """
    text = os.fspath(source)
    path = Path(text)
    skipped: Counter[str] = Counter()
    num_repeated = 0
    if scheme_of(text) is not None:
        from embedder.sources.url_folder import list_url

        refs, skipped = list_url(text)
    elif stat.S_ISDIR(mode := mode_of(path)):
        refs, skipped = list_folder(path)
    elif stat.S_ISREG(mode):
        refs, num_repeated = list_manifest(path)
    elif is_glob(text):
        refs, skipped = list_glob(text)
    else:
        why = f"is {kind_of_file(mode)}" if mode else "does not exist"
        raise SourceError(
            f"The source must be a folder, a glob, a manifest ({', '.join(MANIFEST_EXTENSIONS)}) "
            f"or a URL. Received: {text}, which {why}"
        )
    _check_unique(refs, text)
    if refs.num_rows == 0:
        raise SourceError(f"The source {text} holds no image{_describe_skipped(skipped)}")
    return Listing(refs.sort_by("image_id"), skipped, num_repeated, text)


def _check_unique(refs: pa.Table, source: str) -> None:
    counts = refs["image_id"].combine_chunks().value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        same = sorted(refs.filter(pc.equal(refs["image_id"], repeated[0]))["path"].to_pylist())
        raise SourceError(
            f"Every image of a source must have an id of its own. Received: {source}, with files "
            f"whose names read the same once bytes that are not UTF-8 are written as \\xNN: "
            f"{' and '.join(map(repr, same))}; rename one"
        )


def _describe_skipped(skipped: Counter[str]) -> str:
    if not skipped:
        return ""
    kinds = ", ".join(f"{extension} {count:,}" for extension, count in skipped.most_common(5))
    return f" ({skipped.total():,} other files: {kinds})"
