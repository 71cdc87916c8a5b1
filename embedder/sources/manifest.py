"""Manifests: lists of images, as text, CSV or Parquet."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from embedder.columns import RESERVED_COLUMNS
from embedder.errors import SourceError
from embedder.sources.folder import size_and_time
from embedder.sources.refs import RefRow, make_refs
from embedder.sources.urls import scheme_of

MANIFEST_EXTENSIONS = (".txt", ".csv", ".parquet")


def list_manifest(manifest: Path) -> tuple[pa.Table, int]:
    """List the images that a manifest names.

    Returns:
        Table of refs with the manifest's own columns, and the number of lines that name a path
        again.

    Raises:
        SourceError: The manifest cannot be read, or is not as a manifest must be.
    """
    table = _read(manifest)
    ids = table["path"].to_pylist()
    if (empty := next((row for row, path in enumerate(ids, 1) if not path), None)) is not None:
        raise SourceError(f"Row {empty} of {manifest} has no path")
    refs = make_refs(_row(image_id, manifest.parent) for image_id in ids)
    for name in table.column_names:
        if name != "path":
            refs = refs.append_column(name, _plain(table[name]))
    unique = _first_of_each(refs)
    return unique, refs.num_rows - unique.num_rows


def _row(image_id: str, folder: Path) -> RefRow:
    if scheme_of(image_id) is not None:
        return image_id, image_id.encode(), None, None
    path = os.path.join(folder, image_id)
    return image_id, os.fsencode(path), *size_and_time(path)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in the type that it has when it comes back from a store."""
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    if pa.types.is_string_view(column.type):
        return column.cast(pa.string())
    return column


def _first_of_each(refs: pa.Table) -> pa.Table:
    if pc.count_distinct(refs["image_id"]).as_py() == refs.num_rows:
        return refs
    numbered = refs.select(["image_id"]).append_column("row", pa.array(range(refs.num_rows)))
    first = numbered.group_by("image_id").aggregate([("row", "min")])
    return refs.take(first["row_min"])


def _read(manifest: Path) -> pa.Table:
    """The manifest as a table, whose `path` is text."""
    kind = manifest.suffix.lower()
    try:
        if kind == ".txt":
            paths = manifest.read_text(encoding="utf-8-sig").split("\n")
            table = pa.table({"path": pa.array([path for path in paths if path], pa.string())})
        elif kind == ".csv":
            table = _read_csv(manifest)
        elif kind == ".parquet":
            with pa.OSFile(os.fsencode(manifest)) as file:  # a text must be UTF-8
                table = pq.read_table(file)
        else:
            raise SourceError(
                f"A manifest must be one of {', '.join(MANIFEST_EXTENSIONS)}. Received: {manifest}"
            )
    except (pa.ArrowException, ValueError, OSError) as error:
        raise SourceError(f"The manifest {manifest} cannot be read: {error}") from error
    if "path" not in table.column_names:
        raise SourceError(
            f"A manifest must have a `path` column. "
            f"Received: {manifest} with {', '.join(table.column_names)}"
        )
    if taken := sorted(RESERVED_COLUMNS & set(table.column_names) - {"path"}):
        raise SourceError(
            f"A manifest must not have columns that the store has itself. "
            f"Received: {', '.join(taken)} in {manifest}; rename them"
        )
    if len(set(table.column_names)) != table.num_columns:
        raise SourceError(f"{manifest} has two columns of one name")
    try:
        paths = table["path"].cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SourceError(f"The column `path` of {manifest} must be text: {error}") from error
    return table.set_column(table.column_names.index("path"), "path", paths)


def _read_csv(manifest: Path) -> pa.Table:
    # Text as written: guessed types would turn the label 007 into 7.
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(pa.OSFile(os.fsencode(manifest)), parse_options=parse) as reader:
        names = reader.schema.names
    convert = pa.csv.ConvertOptions(column_types={name: pa.string() for name in names})
    return pa.csv.read_csv(
        pa.OSFile(os.fsencode(manifest)), parse_options=parse, convert_options=convert
    )
