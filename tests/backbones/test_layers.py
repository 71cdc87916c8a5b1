"""Any layer, several in one pass, and what becomes of a feature map."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder import extract
from embedder.backbones.graph import layer_shapes
from embedder.checks.verify import verify
from embedder.errors import RecipeError, RequestError
from tests.support import assert_same_vectors

SMALL: dict[str, Any] = {"backbone": "mobilenet", "weights": "random", "image_size": (64, 96)}


def test_several_layers_are_columns_of_one_pass(archive: Path, tmp_path: Path) -> None:
    layers = ("conv_pw_6_relu", "conv_pw_13_relu")
    store = extract(archive, tmp_path / "two", layers=layers, **SMALL)
    assert store.table().column_names[-2:] == list(layers)
    assert [store.vectors(layer).shape for layer in layers] == [(20, 512), (20, 1024)]
    for layer in layers:
        alone = extract(archive, tmp_path / layer, layers=(layer,), **SMALL)
        assert alone.table().column_names[-1] == "embedding"
        assert_same_vectors(store.vectors(layer), alone.vectors())
    whole = extract(archive, tmp_path / "whole", **SMALL)
    assert_same_vectors(store.vectors(layers[1]), whole.vectors())
    with pytest.raises(RecipeError, match=r"features: conv_pw_6_relu, conv_pw_13_relu. Received"):
        store.vectors()
    assert all(check.passed for check in verify(store, str(archive), audit=4))


def test_rows_of_several_layers_are_kept_when_a_date_changes(archive: Path, tmp_path: Path) -> None:
    options = SMALL | {"layers": ("conv_pw_6_relu", "conv_pw_13_relu")}
    before = extract(archive, tmp_path / "s", **options).table()
    os.utime(archive / "cats" / "000.png", (1, 1))
    store = extract(archive, tmp_path / "s", **options)
    assert store.runs()[-1]["counts"]["updated"] == 1
    after = store.table()
    assert after.drop_columns(["modified"]).equals(before.drop_columns(["modified"]))
    assert after.schema.equals(before.schema)


@pytest.mark.parametrize(
    ("pooling", "shape"), [("flatten", (20, 2 * 3 * 1024)), ("none", (20, 2, 3, 1024))]
)
def test_a_feature_map_is_stored_whole(
    archive: Path, tmp_path: Path, pooling: str, shape: tuple[int, ...]
) -> None:
    store = extract(archive, tmp_path / "maps", pooling=pooling, **SMALL)
    maps = store.vectors()
    assert maps.shape == shape
    average = extract(archive, tmp_path / "average", **SMALL).vectors()
    largest = extract(archive, tmp_path / "max", pooling="max", **SMALL).vectors()
    power = extract(archive, tmp_path / "gem", pooling="gem", **SMALL).vectors()
    positions = maps.reshape(20, 6, 1024).astype(np.float64)
    assert_same_vectors(average, positions.mean(axis=1))
    assert_same_vectors(largest, positions.max(axis=1))
    cubes = np.maximum(positions, 1e-6) ** 3
    assert_same_vectors(power, np.cbrt(cubes.mean(axis=1)))
    assert all(check.passed for check in verify(store, audit=2))


def test_an_unmapped_tensor_is_read_as_such_by_arrow(archive: Path, tmp_path: Path) -> None:
    store = extract(
        *(archive, tmp_path / "maps"),
        **SMALL,
        pooling="none",
        store_dtype="float16",
    )
    field = pq.read_schema(store.shards()[0]).field("embedding")
    assert field.type == pa.fixed_shape_tensor(pa.float16(), (2, 3, 1024))
    assert not field.nullable


def test_a_layer_that_is_not_there_is_refused_with_those_near_it(
    archive: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"such as .*conv_pw_13_relu.*Received: conv_pw_31_relu"):
        extract(
            *(archive, tmp_path / "out"),
            **SMALL,
            layers=("conv_pw_31_relu",),
        )
    assert not (tmp_path / "out").exists()


def test_a_manifests_column_must_not_be_called_like_a_layer(archive: Path, tmp_path: Path) -> None:
    (archive / "list.csv").write_text("path,conv_pw_6_relu\ncats/000.png,1\n")
    with pytest.raises(
        RequestError, match=r"other names than the layers. Received: conv_pw_6_relu"
    ):
        extract(
            *(archive / "list.csv", tmp_path / "out"),
            **SMALL,
            layers=("conv_pw_6_relu", "conv_pw_13_relu"),
        )
    assert not (tmp_path / "out").exists()


def test_names_that_keras_counts_do_not_depend_on_the_process() -> None:
    first, again = (list(layer_shapes("mobilenet-v3-small")) for _ in range(2))
    assert first == again
    assert "activation_17" in first
