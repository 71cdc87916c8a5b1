"""Manifests: text, CSV and Parquet."""

import csv
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder.errors import SourceError
from embedder.sources.listing import list_images
from embedder.sources.refs import REF_SCHEMA
from tests.support import contents, holding, ids, touch, write


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_a_manifest_finds_every_hostile_name(odd: Path, kind: str) -> None:
    folder = odd / "names"
    names = ids(list_images(folder))
    manifest = folder / f"list.{kind}"
    with manifest.open("w", newline="", encoding="utf-8") as lines:
        if kind == "csv":
            csv.writer(lines).writerows([["path"], *([name] for name in names)])
        else:
            lines.writelines(f"{name}\n" for name in names)
    try:
        assert contents(list_images(manifest)) == contents(list_images(folder))
    finally:
        manifest.unlink()


def test_a_text_manifest_has_one_path_a_line_relative_to_its_folder(photos: Path) -> None:
    manifest = write(photos, "list.txt", "cats/b.jpg\na.jpg\n../photos/cats/c.png")
    listing = list_images(manifest)
    assert contents(listing) == {
        "../photos/cats/c.png": b"cats/c.png",
        "a.jpg": b"a.jpg",
        "cats/b.jpg": b"cats/b.jpg",
    }
    assert listing.refs.schema == REF_SCHEMA
    assert listing.refs["bytes"].to_pylist() == [10, 5, 10]
    modified = int((photos / "a.jpg").stat().st_mtime)
    assert int(listing.refs["modified"][1].as_py().timestamp()) == modified


def test_spaces_in_a_text_manifest_are_part_of_the_name(tmp_path: Path) -> None:
    names = ["  two spaces.jpg", "a b.jpg", "end .jpg "]
    touch(tmp_path, *names)
    listing = list_images(write(tmp_path, "list.txt", "\n".join(names)))
    assert contents(listing) == holding(*names)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfa.jpg\ncats/b.jpg\n",
        b"a.jpg\r\ncats/b.jpg\r\n",
        b"\n\na.jpg\n\n\ncats/b.jpg\n\n",
        b"\r\na.jpg\r\n\r\ncats/b.jpg",
    ],
    ids=["byte-order mark", "CRLF", "blank lines", "blank lines and CRLF"],
)
def test_marks_of_other_systems_and_blank_lines_are_no_part_of_a_path(
    photos: Path, text: bytes
) -> None:
    assert contents(list_images(write(photos, "list.txt", text))) == holding("a.jpg", "cats/b.jpg")


def test_a_csv_manifest_carries_its_columns_as_written(photos: Path) -> None:
    text = 'label,path,"two words"\n007,cats/b.jpg,1.50\n,a.jpg,true\n'
    listing = list_images(write(photos, "list.csv", text))
    assert listing.refs.drop_columns(["bytes", "modified"]).to_pylist() == [
        {"image_id": "a.jpg", "path": bytes(photos / "a.jpg"), "label": "", "two words": "true"},
        {
            "image_id": "cats/b.jpg",
            "path": bytes(photos / "cats/b.jpg"),
            "label": "007",
            "two words": "1.50",
        },
    ]
    assert listing.refs.schema.field("label").type == pa.string()


def test_values_of_a_csv_manifest_may_be_quoted_and_span_lines(tmp_path: Path) -> None:
    touch(tmp_path, 'the "big", one.jpg', "two\nlines.jpg")
    text = '"path",note\n"the ""big"", one.jpg","line 1\nline 2"\n"two\nlines.jpg",x\n'
    listing = list_images(write(tmp_path, "list.csv", text))
    assert contents(listing) == holding('the "big", one.jpg', "two\nlines.jpg")
    assert listing.refs["note"].to_pylist() == ["line 1\nline 2", "x"]


def test_values_that_span_lines_may_be_cut_by_the_end_of_a_block(photos: Path) -> None:
    # Arrow reads a CSV in blocks of a megabyte, and must not cut one within a value.
    notes = [f"line {number}\n" * 60_000 for number in range(4)]
    names = ["a.jpg", "cats/b.jpg", "cats/c.png", "cats/old/d.jpg"]
    text = "".join(f'{name},"{note}"\n' for name, note in zip(names, notes, strict=True))
    listing = list_images(write(photos, "list.csv", f"path,note\n{text}"))
    assert contents(listing) == holding(*names)
    assert listing.refs["note"].to_pylist() == notes


def test_a_csv_manifest_may_come_from_a_spreadsheet(photos: Path) -> None:
    text = b"\xef\xbb\xbfpath,label\r\na.jpg,x\r\n\r\ncats/b.jpg,y\r\n"
    listing = list_images(write(photos, "list.CSV", text))
    assert contents(listing) == holding("a.jpg", "cats/b.jpg")
    assert listing.refs["label"].to_pylist() == ["x", "y"]


def test_a_parquet_manifest_keeps_the_types_of_its_columns(photos: Path) -> None:
    table = pa.table(
        {
            "weight": pa.array([1.5, None], pa.float32()),
            "path": ["cats/b.jpg", "a.jpg"],
            "tags": [["x", "y"], []],
        }
    )
    pq.write_table(table, photos / "list.parquet")
    listing = list_images(photos / "list.parquet")
    assert contents(listing) == holding("a.jpg", "cats/b.jpg")
    assert listing.refs.column_names == [*REF_SCHEMA.names, "weight", "tags"]
    assert listing.refs.schema.field("weight").type == pa.float32()
    assert listing.refs["weight"].to_pylist() == [None, 1.5]
    assert listing.refs["tags"].to_pylist() == [[], ["x", "y"]]


@pytest.mark.parametrize(
    "type_of_path",
    [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_a_parquet_manifest_may_have_paths_of_any_text_type(
    photos: Path, type_of_path: pa.DataType
) -> None:
    paths = pa.array(["a.jpg", "cats/b.jpg"]).cast(type_of_path)
    pq.write_table(pa.table({"path": paths}), photos / "list.parquet")
    assert contents(list_images(photos / "list.parquet")) == holding("a.jpg", "cats/b.jpg")


def test_a_manifest_may_name_absolute_paths(photos: Path, tmp_path: Path) -> None:
    path = str(photos / "cats/b.jpg")
    (tmp_path / "lists").mkdir()
    listing = list_images(write(tmp_path / "lists", "list.txt", path))
    assert contents(listing) == {path: b"cats/b.jpg"}
    assert listing.refs["bytes"].to_pylist() == [10]


def test_a_manifest_may_name_urls(photos: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/bucket/x.jpg", b"from memory")
    urls = [f"file://{photos}/cats/b.jpg", "memory://bucket/x.jpg"]
    listing = list_images(write(photos, "list.txt", "\n".join([*urls, "a.jpg"])))
    assert contents(listing) == {
        "a.jpg": b"a.jpg",
        urls[0]: b"cats/b.jpg",
        urls[1]: b"from memory",
    }
    assert listing.refs["bytes"].to_pylist() == [5, None, None]
    assert listing.refs["modified"].to_pylist()[1:] == [None, None]


def test_a_missing_file_that_a_manifest_names_is_still_an_input(photos: Path) -> None:
    listing = list_images(write(photos, "list.txt", "a.jpg\nnope.jpg\n"))
    assert ids(listing) == ["a.jpg", "nope.jpg"]
    assert listing.refs["bytes"].to_pylist() == [5, None]
    assert listing.refs["modified"].to_pylist()[1] is None


def test_a_manifest_may_name_a_file_of_any_extension(photos: Path) -> None:
    touch(photos, "no-extension")
    assert contents(list_images(write(photos, "list.txt", "no-extension"))) == holding(
        "no-extension"
    )


def test_of_paths_named_again_the_first_is_kept(photos: Path) -> None:
    text = "path,label\ncats/b.jpg,1\na.jpg,2\ncats/b.jpg,3\na.jpg,4\na.jpg,5\n"
    listing = list_images(write(photos, "list.csv", text))
    assert ids(listing) == ["a.jpg", "cats/b.jpg"]
    assert listing.refs["label"].to_pylist() == ["2", "1"]
    assert listing.num_repeated == 3


def test_a_manifest_of_another_kind_is_refused(photos: Path) -> None:
    rule = r"one of \.txt, \.csv, \.parquet\. Received: .*list\.json"
    with pytest.raises(SourceError, match=rule):
        list_images(write(photos, "list.json", "[]"))


def test_a_manifest_without_paths_is_refused(photos: Path) -> None:
    rule = r"must have a `path` column\. Received: .*list\.csv with file, label"
    with pytest.raises(SourceError, match=rule):
        list_images(write(photos, "list.csv", "file,label\na.jpg,x\n"))


@pytest.mark.parametrize(
    "name",
    [
        *("image_id", "sha256", "bytes", "width", "height", "format", "modified", "embedding"),
        *("stage", "error", "shard", "same_file"),
    ],
)
def test_a_column_that_the_store_has_itself_is_refused(photos: Path, name: str) -> None:
    rule = rf"must not have columns that the store has itself\. Received: {name} in .*rename"
    with pytest.raises(SourceError, match=rule):
        list_images(write(photos, "list.csv", f"path,{name}\na.jpg,x\n"))


@pytest.mark.parametrize("header", ["path,label,label", "path,path,label"])
def test_two_columns_of_one_name_are_refused(photos: Path, header: str) -> None:
    with pytest.raises(SourceError, match=r"list\.csv has two columns of one name"):
        list_images(write(photos, "list.csv", f"{header}\na.jpg,b.jpg,y\n"))


def test_an_empty_path_is_refused_with_its_row(photos: Path) -> None:
    with pytest.raises(SourceError, match=r"^Row 2 of .*list\.csv has no path$"):
        list_images(write(photos, "list.csv", "path,label\na.jpg,x\n,y\ncats/b.jpg,z\n"))
    pq.write_table(pa.table({"path": ["a.jpg", "b.jpg", None]}), photos / "list.parquet")
    with pytest.raises(SourceError, match=r"^Row 3 of .*list\.parquet has no path$"):
        list_images(photos / "list.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", b"caf\xe9.jpg\n"),
        ("list.csv", b"path\ncaf\xe9.jpg\n"),
        ("list.csv", b"path,caf\xe9\na.jpg,x\n"),
        ("list.csv", b""),
        ("list.csv", b"path,label\na.jpg\n"),
        ("list.parquet", b"PAR1 but no more"),
    ],
    ids=["text", "cell", "header", "empty", "short row", "no parquet"],
)
def test_a_manifest_that_cannot_be_read_is_refused(photos: Path, name: str, content: bytes) -> None:
    with pytest.raises(SourceError, match=rf"^The manifest .*{name} cannot be read: ."):
        list_images(write(photos, name, content))


@pytest.mark.parametrize("paths", [pa.array([b"\xff.jpg"]), pa.array([["a.jpg"]])], ids=str)
def test_paths_that_are_no_text_are_refused(tmp_path, paths) -> None:
    pq.write_table(pa.table({"path": paths}), tmp_path / "l.parquet")
    with pytest.raises(SourceError):
        list_images(tmp_path / "l.parquet")
