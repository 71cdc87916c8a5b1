"""Labels find their images, whatever they are written in."""

from pathlib import Path

import numpy as np
import pytest

from embedder.datasets.labels import read_labels, read_named_column
from embedder.datasets.training_set import read_training_set
from embedder.errors import RequestError, SourceError, StoreError
from embedder.store.store import Store
from tests.support import DIM, add_rows


def test_folder_is_the_first_folder_and_parent_the_containing_one(store: Store) -> None:
    add_rows(store, ["a/b/c/1.jpg", "a/2.jpg", "d/e/3.jpg"], np.zeros((3, DIM)))
    assert read_labels(store, "folder", store.ids()) == {
        "a/b/c/1.jpg": "a",
        "a/2.jpg": "a",
        "d/e/3.jpg": "d",
    }
    assert read_labels(store, "parent", store.ids()) == {
        "a/b/c/1.jpg": "c",
        "a/2.jpg": "a",
        "d/e/3.jpg": "e",
    }


@pytest.mark.parametrize("labels", ["folder", "parent"])
def test_an_image_in_no_folder_has_no_label(store: Store, labels: str) -> None:
    add_rows(store, ["1.jpg", "a/2.jpg"], np.zeros((2, DIM)))
    assert read_labels(store, labels, store.ids()) == {"a/2.jpg": "a"}


def test_a_column_of_the_store_gives_labels_as_text(store: Store) -> None:
    add_rows(store, ["1.jpg", "2.jpg", "3.jpg"], np.zeros((3, DIM)), {"kind": [7, None, 0]})
    assert read_labels(store, "column:kind", store.ids()) == {"1.jpg": "7", "3.jpg": "0"}


def test_a_label_file_is_joined_on_its_path_column(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "my: labels.csv"
    file.write_text(
        "\ufeffkind, path, note\n"  # as a spreadsheet writes it, and with spaces as grocery has
        '007 , a/1.jpg, "x, y"\n'
        "cats, elsewhere.jpg,\n"
        ", a/2.jpg,\n"
        '"two words", "b, c.jpg",\n',
        encoding="utf-8",
    )
    assert read_labels(store, f"{file}:kind", store.ids()) == {
        "a/1.jpg": "007",
        "elsewhere.jpg": "cats",
        "b, c.jpg": "two words",
    }
    assert read_labels(store, f"{file}:note", store.ids()) == {"a/1.jpg": "x, y"}


def test_lists_without_names_are_read_by_the_fields_number(store: Store, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a/1.jpg, 7, red\n\nb/2.jpg, 8, blue\n")
    (tmp_path / "test.txt").write_text('"c, d.jpg", 9,\n')
    assert read_labels(store, f"{tmp_path}/train.txt:2", store.ids()) == {
        "a/1.jpg": "7",
        "b/2.jpg": "8",
    }
    every = {"a/1.jpg": "7", "b/2.jpg": "8", "c, d.jpg": "9"}
    assert read_labels(store, f"{tmp_path}/*.txt:2", store.ids()) == every
    assert read_labels(store, f"{tmp_path}/*.txt:3", store.ids()) == {
        "a/1.jpg": "red",
        "b/2.jpg": "blue",
    }


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_field_that_a_list_lacks_is_refused(store: Store, tmp_path: Path, number: int) -> None:
    (tmp_path / "l.txt").write_text("a/1.jpg, 7, red\n")
    with pytest.raises(SourceError, match=rf"the field {number} in every line.*with a/1.jpg,7,red"):
        read_labels(store, f"{tmp_path}/l.txt:{number}", store.ids())


@pytest.mark.parametrize("labels", ["", "folders", "kind", "labels.csv", "labels.txt:kind", ":x"])
def test_labels_of_no_known_spelling_are_refused(store: Store, labels: str) -> None:
    rule = r"must be folder, parent, FILE\.csv:COLUMN, LIST\.txt:NUMBER or column:NAME\. Received:"
    with pytest.raises(RequestError, match=rule) as caught:
        read_labels(store, labels, store.ids())
    assert str(caught.value).endswith(repr(labels))


def test_a_column_that_is_not_there_is_refused_with_those_that_are(store: Store) -> None:
    add_rows(store, ["1.jpg"], np.zeros((1, DIM)), {"kind": ["x"]})
    rule = r"must name a column of the store\. Received: colour\. It has: image_id, .*, kind, "
    with pytest.raises(RequestError, match=rule):
        read_labels(store, "column:colour", store.ids())


@pytest.mark.parametrize("header", ["path,colour", "file,kind"])
def test_a_label_file_without_the_columns_is_refused(
    zoo: Store, tmp_path: Path, header: str
) -> None:
    (tmp_path / "labels.csv").write_text(f"{header}\na.jpg,x\n")
    rule = rf"columns `path` and `kind`\. Received: .*labels\.csv with {header.replace(',', ', ')}$"
    with pytest.raises(SourceError, match=rule):
        read_training_set(zoo, f"{tmp_path}/labels.csv:kind")


def test_a_label_file_of_only_a_header_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,kind\n")
    assert read_named_column(tmp_path / "labels.csv", "kind") == {}


@pytest.mark.parametrize("name", ["nope.csv:kind", "nope.txt:2"])
def test_a_label_file_that_does_not_exist_is_refused(zoo: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=r"nope\.\w+ cannot be read: .*No such file"):
        read_training_set(zoo, f"{tmp_path}/{name}")


def test_a_label_file_that_is_not_utf8_is_refused(zoo: Store, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"path,kind\ncaf\xe9.jpg,x\n")
    with pytest.raises(SourceError, match=r"labels\.csv cannot be read: 'utf-8' codec"):
        read_training_set(zoo, f"{tmp_path}/labels.csv:kind")


def test_codes_are_the_labelled_rows_and_indices_in_the_sorted_classes(
    store: Store, tmp_path: Path
) -> None:
    add_rows(store, [f"{n}.jpg" for n in range(5)], np.zeros((5, DIM)))
    (tmp_path / "l.csv").write_text("path,k\n4.jpg,b\n1.jpg,c\n2.jpg,b\nelsewhere.jpg,a\n")
    targets = read_training_set(store, f"{tmp_path}/l.csv:k")
    assert targets.classes.tolist() == ["b", "c"]  # `a` is of no image of the store
    by_id = dict(zip(targets.ids, targets.texts(), strict=True))
    assert by_id == {"1.jpg": "c", "2.jpg": "b", "4.jpg": "b"}
    assert targets.num_unlabelled == 2
    known = read_training_set(store, f"{tmp_path}/l.csv:k", known=np.array(["a", "c"]))
    assert known.classes.tolist() == ["a", "b", "c"]
    assert known.texts().tolist() == targets.texts().tolist()


def test_several_labels_are_one_indicator_each(store: Store) -> None:
    labels = ["red; round", "round", "  ", "blue;red;"]
    add_rows(store, [f"{n}.jpg" for n in range(4)], np.zeros((4, DIM)), {"tags": labels})
    targets = read_training_set(store, "column:tags", separator=";")
    assert targets.classes.tolist() == ["blue", "red", "round"]
    assert targets.codes.tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert targets.texts().tolist() == ["red;round", "round", "", "blue;red"]


def test_labels_that_would_be_torn_apart_are_refused(store: Store) -> None:
    add_rows(store, ["0.jpg", "1.jpg"], np.zeros((2, DIM)), {"tags": ["red;ish|round", "round"]})
    with pytest.raises(RequestError, match="none may contain `;`.*Received: red;ish"):
        read_training_set(store, "column:tags", separator="|")
    whole = read_training_set(store, "column:tags")  # one label an image: nothing is torn
    assert whole.classes.tolist() == ["red;ish|round", "round"]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("column:same", r"which gives 30 of 30 images a label and 1 class\(es\)"),
        ("column:none", r"which gives 0 of 30 images a label and 0 class\(es\)"),
    ],
)
def test_fewer_than_two_classes_are_refused_with_what_was_found(
    store: Store, labels: str, found: str
) -> None:
    extras = {"same": ["x"] * 30, "none": [None] * 30}
    add_rows(store, [f"{i}.jpg" for i in range(30)], np.zeros((30, DIM)), extras)
    rule = rf"at least two classes\. Received: labels='{labels}', {found}$"
    with pytest.raises(RequestError, match=rule):
        read_training_set(store, labels)


def test_a_store_without_rows_is_refused(store: Store) -> None:
    with pytest.raises((StoreError, RequestError), match="no rows yet|0 of 0 images"):
        read_training_set(store, "folder")


def test_a_store_with_an_image_twice_is_not_learned_from(zoo: Store) -> None:
    path = zoo.shards()[0]
    path.with_name("again.parquet").write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="each image once.*in which 30 stand again"):
        read_training_set(zoo, "parent")
