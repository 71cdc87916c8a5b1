"""Sources: folders, globs, manifests and URLs, to refs that find their bytes."""

import csv
import gzip
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import known_implementations

from embedder.errors import ReadError, SourceError
from embedder.sources import listing as sources
from embedder.sources.listing import REF_SCHEMA, Listing, list_images, read_bytes
from tests.support import WebServer, body, status

MOMENT = datetime(2024, 2, 29, 12, 30, 15, 123456, UTC)


def touch(folder: Path, *names: str) -> Path:
    """Make files that hold their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def ids(listing: Listing) -> list[str]:
    found: list[str] = listing.refs["image_id"].to_pylist()
    return found


def contents(listing: Listing) -> dict[str, bytes]:
    """What `read_bytes` gives for every ref, by id."""
    paths = listing.refs["path"].to_pylist()
    return dict(zip(ids(listing), map(read_bytes, paths), strict=True))


def holding(*names: str) -> dict[str, bytes]:
    return {name: name.encode() for name in names}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return touch(tmp_path / "photos", "a.jpg", "cats/b.jpg", "cats/c.png", "cats/old/d.jpg")


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """The file system of `memory://`, empty before and after."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


# Folders ---------------------------------------------------------------------------------------


def test_a_folder_is_listed_with_its_folders(photos: Path) -> None:
    listing = list_images(photos)
    assert contents(listing) == holding("a.jpg", "cats/b.jpg", "cats/c.png", "cats/old/d.jpg")
    assert listing.refs.schema == REF_SCHEMA
    assert listing.skipped == {}
    assert listing.num_repeated == 0


def test_a_folder_may_be_given_as_text_and_by_a_relative_path(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    assert ids(list_images("photos")) == ids(list_images("./photos/")) == ids(list_images(photos))
    monkeypatch.chdir(photos)
    assert contents(list_images(".")) == contents(list_images(photos))


def test_extensions_count_in_any_case_and_other_files_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "A.JPG", "b.Jpeg", "c.tIFF", "d.webp")
    touch(tmp_path, "notes.txt", "deep/more.TXT", "Makefile", "jpg", ".jpg", "a.jpg.bak")
    listing = list_images(tmp_path)
    assert ids(listing) == ["A.JPG", "b.Jpeg", "c.tIFF", "d.webp"]
    assert listing.skipped == {".txt": 2, "no extension": 3, ".bak": 1}


def test_refs_are_sorted_by_the_whole_id(tmp_path: Path) -> None:
    # Walking folder by folder would give a/b.jpg before a-c.jpg.
    expected = ["B.jpg", "a-c.jpg", "a.jpg", "a/b.jpg", "a/c.jpg", "b.jpg", "é.jpg"]
    assert ids(list_images(touch(tmp_path, *reversed(expected)))) == expected


def test_size_and_time_of_change_are_those_of_the_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    nanoseconds = int(MOMENT.timestamp()) * 10**9 + 123_456_789
    os.utime(tmp_path / "a.jpg", ns=(0, nanoseconds))
    (ref,) = list_images(tmp_path).refs.to_pylist()
    assert ref["bytes"] == len("a.jpg")
    assert ref["modified"] == MOMENT


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/much longer name.jpg")
    folder = touch(tmp_path / "photos", "a.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "elsewhere/much longer name.jpg")
    listing = list_images(folder)
    assert contents(listing) == {
        "a.jpg": b"a.jpg",
        "link.jpg": b"elsewhere/much longer name.jpg",
    }
    assert listing.refs["bytes"].to_pylist() == [5, 30]


def test_a_link_to_a_folder_is_not_followed(photos: Path) -> None:
    (photos / "again").symlink_to(photos / "cats")
    (photos / "round").symlink_to(photos)
    (photos / "looks-like.jpg").symlink_to(photos / "cats")
    listing = list_images(photos)
    assert ids(listing) == ["a.jpg", "cats/b.jpg", "cats/c.png", "cats/old/d.jpg"]
    assert listing.skipped == {}


def test_the_source_itself_may_be_a_link_to_a_folder(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(photos)
    assert contents(list_images(tmp_path / "link")) == contents(list_images(photos))


def test_a_link_that_leads_nowhere_is_listed_and_fails_when_read(photos: Path) -> None:
    (photos / "gone.jpg").symlink_to(photos / "no such file")
    (photos / "gone.txt").symlink_to(photos / "no such file")
    listing = list_images(photos)
    ref = next(ref for ref in listing.refs.to_pylist() if ref["image_id"] == "gone.jpg")
    assert (ref["bytes"], ref["modified"]) == (None, None)
    assert listing.skipped == {".txt": 1}
    with pytest.raises(ReadError, match="FileNotFoundError: No such file or directory"):
        read_bytes(ref["path"])


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "folder.jpg/inside.jpg", "empty.jpg/notes.txt")
    assert ids(list_images(tmp_path)) == ["folder.jpg/inside.jpg"]


def test_what_is_neither_file_nor_folder_is_left_out(photos: Path) -> None:
    os.mkfifo(photos / "pipe.jpg")  # reading it would wait for ever
    listing = list_images(photos)
    assert "pipe.jpg" not in ids(listing)
    assert listing.skipped["FIFO, socket or device"] == 1


def test_names_that_are_not_utf8_are_readable_and_can_be_read(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "photos")
    for name in (b"caf\xe9/\xff\xfe.jpg", "café/né.jpg".encode()):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path))  # noqa: PTH103, PTH120 - not UTF-8
        Path(os.fsdecode(path)).write_bytes(name)
    listing = list_images(tmp_path / "photos")
    assert contents(listing) == {
        r"caf\xe9/\xff\xfe.jpg": b"caf\xe9/\xff\xfe.jpg",
        "café/né.jpg": "café/né.jpg".encode(),
    }


def test_a_folder_without_an_image_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.txt", "c.pdf")
    with pytest.raises(SourceError, match=r"holds no image \(3 other files: \.txt 2, \.pdf 1\)$"):
        list_images(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"^The source {tmp_path} holds no image$"):
        list_images(tmp_path)


def test_a_source_that_does_not_exist_is_refused_with_what_there_can_be(tmp_path: Path) -> None:
    rule = r"a folder, a glob, a manifest \(\.txt, \.csv, \.parquet\) or a URL\. Received: .*/nope"
    with pytest.raises(SourceError, match=rule):
        list_images(tmp_path / "nope")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no FIFOs")
def test_a_source_that_is_a_fifo_is_named_as_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photos.txt")
    with pytest.raises(SourceError, match=r"photos\.txt, which is a FIFO$"):
        list_images(tmp_path / "photos.txt")


# The names and kinds of the shared odd files ---------------------------------------------------


def test_every_hostile_name_is_listed_and_readable(odd: Path) -> None:
    listing = list_images(odd / "names")
    expected = {
        path.relative_to(odd / "names").as_posix(): path.read_bytes()
        for path in (odd / "names").rglob("*")
        if path.is_file() and path.name != "no-extension"
    }
    assert len(expected) == 27
    assert contents(listing) == expected
    assert listing.skipped == {"no extension": 1}
    assert ids(listing) == sorted(expected, key=str.encode)


def test_the_odd_files_are_all_listed_but_those_of_other_extensions(odd: Path) -> None:
    listing = list_images(odd)
    with (odd / "expected.csv").open(newline="", encoding="utf-8") as lines:
        files = {row["file"] for row in csv.DictReader(lines)}
    assert listing.skipped == Counter(
        {".fuzzed": 2, ".bin": 1, ".svg": 1, ".pdf": 1, ".csv": 1, ".tar": 1, "no extension": 1}
    )
    assert files - set(ids(listing)) == {
        "broken/check.svg",
        "broken/duplicate_xref_entry.pdf",
        "broken/fli_overrun.bin",
        "fuzzed/crash-4ace288d.fuzzed",
        "fuzzed/crash-63fe39cb.fuzzed",
        "names/no-extension",
    }
    assert set(ids(listing)) < files


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


# Globs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos/*.jpg", ["a.jpg"]),
        ("photos/**/*.jpg", ["a.jpg", "cats/b.jpg", "cats/old/d.jpg"]),
        ("photos/cats/*", ["b.jpg", "c.png"]),
        ("photos/*/*.jpg", ["cats/b.jpg"]),
        ("photos/c*/**/d.jpg", ["cats/old/d.jpg"]),
        ("photos/cats/[bc].???", ["b.jpg", "c.png"]),
        ("photos/cats/[!b].*", ["c.png"]),
        ("*/a.jpg", ["photos/a.jpg"]),
    ],
)
def test_a_glob_is_rooted_where_its_first_wildcard_begins(
    photos: Path, pattern: str, expected: list[str]
) -> None:
    listing = list_images(f"{photos.parent}/{pattern}")
    assert ids(listing) == expected
    for image_id, content in contents(listing).items():
        assert content.decode().endswith(image_id.removeprefix("photos/"))


def test_a_glob_may_be_relative(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    assert contents(list_images("**/*.png")) == holding("cats/c.png")
    assert ids(list_images("cats/*.png")) == ["c.png"]


def test_only_what_a_glob_matches_is_counted_as_skipped(photos: Path) -> None:
    touch(photos, "a.txt", "cats/b.txt", "cats/b.md")
    assert list_images(f"{photos}/cats/b.*").skipped == {".txt": 1, ".md": 1}


def test_a_folder_that_exists_is_no_glob(tmp_path: Path) -> None:
    touch(tmp_path, "set [1]/a.jpg", "set 1/b.jpg")
    assert contents(list_images(tmp_path / "set [1]")) == {"a.jpg": b"set [1]/a.jpg"}


def test_a_glob_below_no_folder_is_refused_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no folder .*/nope, where the glob .*/\*\.jpg begins"):
        list_images(f"{tmp_path}/nope/*.jpg")


def test_a_glob_that_matches_nothing_is_refused(photos: Path) -> None:
    with pytest.raises(SourceError, match=r"\*\.gif holds no image$"):
        list_images(f"{photos}/*.gif")


# Manifests -------------------------------------------------------------------------------------


def write(folder: Path, name: str, content: str | bytes) -> Path:
    manifest = folder / name
    manifest.write_bytes(content.encode() if isinstance(content, str) else content)
    return manifest


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


@pytest.mark.parametrize(("name", "content"), [("list.txt", "\n\n"), ("list.csv", "path,label\n")])
def test_a_manifest_without_a_line_is_refused(photos: Path, name: str, content: str) -> None:
    with pytest.raises(SourceError, match=rf"{name} holds no image$"):
        list_images(write(photos, name, content))


# URLs ------------------------------------------------------------------------------------------


def test_a_folder_behind_a_url_is_listed_and_read(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("b.JPG", "cats/a.png", "notes.txt", "README"):
        memory.pipe(f"/bucket/photos/{name}", name.encode())
    memory.pipe("/bucket/photos-old/c.jpg", b"of another folder")
    listing = list_images("memory://bucket/photos")
    assert contents(listing) == holding("b.JPG", "cats/a.png")
    assert listing.refs["bytes"].to_pylist() == [5, 10]
    assert listing.skipped == {".txt": 1, "no extension": 1}
    assert listing.refs.schema == REF_SCHEMA
    assert contents(list_images("memory://bucket/photos/")) == contents(listing)


def test_a_local_folder_may_be_given_as_a_url(odd: Path) -> None:
    by_url, by_path = list_images(f"file://{odd}/names"), list_images(odd / "names")
    assert contents(by_url) == contents(by_path)
    assert by_url.refs["bytes"].equals(by_path.refs["bytes"])
    assert all(by_url.refs["modified"].to_pylist())


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("nosuch://bucket/photos", "nosuch://bucket/photos cannot be listed: ValueError: .*nosuch"),
        ("memory://nowhere/photos", "memory://nowhere/photos holds no image$"),
    ],
)
def test_a_url_that_cannot_be_listed_is_refused(url: str, rule: str) -> None:
    with pytest.raises(SourceError, match=rule):
        list_images(url)


def test_a_url_whose_file_system_is_not_installed_is_refused_with_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = {"class": "absent_package.AbsentFileSystem", "err": "Install absent-package"}
    monkeypatch.setitem(known_implementations, "absent", entry)
    rule = r"absent://x needs a package that is not installed: Install absent-package"
    with pytest.raises(SourceError, match=rule):
        list_images("absent://x")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 client of a real server on the loopback, which `s3://` then reaches too."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url=options["endpoint_url"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    yield client
    client.close()
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_folder_on_s3_is_listed_with_sizes_and_times_and_read(s3: Any) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    s3.create_bucket(Bucket="bucket")
    names = ["a & b #1.jpg", "cats/100%25.PNG", "cats/żółć 写真.jpg"]
    for name in [*names, "notes.txt"]:
        s3.put_object(Bucket="bucket", Key=f"photos/{name}", Body=name.encode())
    s3.put_object(Bucket="bucket", Key="photos/", Body=b"")  # how consoles make a folder
    s3.put_object(Bucket="bucket", Key="photos-old/c.jpg", Body=b"of another folder")
    listing = list_images("s3://bucket/photos")
    assert contents(listing) == holding(*names)
    assert listing.skipped[".txt"] == 1
    assert listing.refs["bytes"].to_pylist() == [len(name.encode()) for name in names]
    assert all(before <= time <= datetime.now(UTC) for time in listing.refs["modified"].to_pylist())
    assert listing.refs["path"][0].as_py() == b"s3://bucket/photos/a & b #1.jpg"


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SourceError, match=r"s3://nope/photos cannot be listed: FileNotFoundError"):
        list_images("s3://nope/photos")


def test_an_object_that_vanished_cannot_be_read(s3: Any) -> None:
    s3.create_bucket(Bucket="bucket")
    with pytest.raises(ReadError, match="FileNotFoundError"):
        read_bytes(b"s3://bucket/photos/gone.jpg")


# Reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        (b"/nowhere/a.jpg", "^FileNotFoundError: No such file or directory$"),
        (os.fsencode(Path(__file__).parent), "^not a regular file, but a folder$"),
        (b"/nul\0.jpg", "^ValueError: .*embedded null"),
        (b"nosuch://a.jpg", "^ValueError: Protocol not known: nosuch"),
        (b"memory://caf\xe9.jpg", "^UnicodeDecodeError: "),
        (b"memory://nowhere/a.jpg", "^FileNotFoundError: /nowhere/a.jpg$"),
    ],
)
def test_bytes_that_cannot_be_had_give_the_reason(path: bytes, rule: str) -> None:
    with pytest.raises(ReadError, match=rule):
        read_bytes(path)


def test_an_enormous_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(2**30 + 1)  # takes no space on the disk
    with pytest.raises(ReadError, match=r"^larger than 1,073,741,824 bytes: 1,073,741,825$"):
        read_bytes(bytes(tmp_path / "a.jpg"))


def test_a_file_of_the_largest_size_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg")
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", len("a.jpg"))
    assert read_bytes(bytes(tmp_path / "a.jpg")) == b"a.jpg"


# A server that is not to be trusted. -----------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "is_passing"), [(404, False), (403, False), (408, True), (429, True), (503, True)]
)
def test_a_status_is_named_and_says_whether_it_may_pass(
    web: WebServer, code: int, is_passing: bool
) -> None:
    web.answers["/a.jpg"] = status(code)
    with pytest.raises(ReadError, match=f"^HTTP status {code} ") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    assert caught.value.is_passing == is_passing


def test_one_request_reads_an_image(web: WebServer) -> None:
    asked = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.command)
        body(b"content")(handler)

    web.answers["/a.jpg"] = answer
    assert read_bytes(f"{web.url}/a.jpg".encode()) == b"content"
    assert asked == ["GET"]


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100_000):  # 6 GB, if nobody hangs up
        handler.wfile.write(bytes(2**16))


def bomb(handler: BaseHTTPRequestHandler) -> None:
    body(gzip.compress(bytes(2**26)), Content_Encoding="gzip")(handler)


@pytest.mark.parametrize("answer", [endless, bomb], ids=lambda answer: answer.__name__)
def test_a_body_is_counted_as_it_comes(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, answer: Callable[..., None]
) -> None:
    web.answers["/a.jpg"] = answer
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 2**24)
    with pytest.raises(ReadError, match="^larger than 16,777,216 bytes") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    assert not caught.value.is_passing


def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    web.answers["/a.jpg"] = lambda _: released.wait(60)
    monkeypatch.setattr(sources, "READ_SECONDS", 0.2)
    with pytest.raises(ReadError, match="not read within 0.2 seconds") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    released.set()
    assert caught.value.is_passing


@pytest.mark.parametrize("length", ["100", "7"])
def test_a_body_that_is_cut_may_be_whole_next_time(web: WebServer, length: str) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body(b"content", Content_Length=length)(handler)

    web.answers["/a.jpg"] = answer
    if length == "7":
        assert read_bytes(f"{web.url}/a.jpg".encode()) == b"content"
        return
    with pytest.raises(ReadError, match="^ClientPayloadError: ") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    assert caught.value.is_passing


def test_a_port_where_nobody_listens_may_have_a_server_next_time(web: WebServer) -> None:
    web.close()
    with pytest.raises(ReadError, match="^ClientConnectorError: ") as caught:
        read_bytes(f"{web.url}/a.jpg".encode())
    assert caught.value.is_passing


# What is no regular file. ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FIFO", "link to a FIFO", "device", "socket", "file URL"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jpg"
    if kind in ("FIFO", "file URL"):
        os.mkfifo(path)
    elif kind == "link to a FIFO":
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    name = bytes(path) if kind != "file URL" else b"file://" + bytes(path)
    with pytest.raises(ReadError, match="^not a regular file, but a ") as caught:
        read_bytes(name)
    assert not caught.value.is_passing


def test_a_file_that_says_it_is_empty_is_read_to_its_end() -> None:
    assert read_bytes(b"/proc/self/status").startswith(b"Name:")


def test_a_file_that_grows_is_read_no_further_than_the_largest_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 100)  # of /proc, which say that they are empty
    with pytest.raises(ReadError, match="^larger than 100 bytes"):
        read_bytes(b"/proc/self/status")


def test_folders_may_be_deeper_than_python_calls_functions(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    assert ids(list_images(tmp_path)) == ["d/" * 1200 + "a.jpg"]
    while (tmp_path / "d" / "d").exists():  # pytest could not remove it
        (tmp_path / "d" / "d").rename(tmp_path / "e")
        (tmp_path / "d").rmdir()
        (tmp_path / "e").rename(tmp_path / "d")
