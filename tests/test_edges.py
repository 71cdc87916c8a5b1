"""Inputs at the edges, each of which once ended in a wrong result or a raw exception."""

import numpy as np
import pytest
from PIL import Image

from embedder.datasets.labels import read_labels
from embedder.decode.decode import decode_rgb
from embedder.errors import SourceError, WeightsError
from embedder.evaluation.metrics import scores
from embedder.recipe import Recipe
from tests.backbones.test_torch_weights import FLOATS, SOUND, read, state_dict, tensor, torch_file
from tests.decode.test_decode import encode, make_recipe
from tests.support import write


# decode
@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(29, 31, 224), (348, 348, 336), (3024, 4032, 176), (480, 640, 464)],
)
def test_rounding_never_puts_the_crop_outside_the_image(height, width, side) -> None:
    pixels = decode_rgb(
        encode(Image.new("RGB", (width, height), "red")), make_recipe((side, side))
    ).pixels
    assert (pixels == (255, 0, 0)).all()


def test_infinite_samples_in_a_picture_of_one_value() -> None:
    values = np.ones((48, 64), np.float32)
    values[0, 0] = np.inf
    assert decode_rgb(encode(values, "TIFF"), make_recipe()).pixels.max() == 0


# heads
def test_a_resample_may_lack_a_predicted_class() -> None:
    scores(np.array([0, 0, 0, 0, 1]), np.array([[0.9, 0.1]] * 3 + [[0.1, 0.9]] * 2))


def test_a_resample_may_be_of_one_class() -> None:
    codes = np.array([0] * 9 + [1])
    scores(codes, np.where(codes[:, None] == np.arange(2), 0.9, 0.1))


def test_a_label_file_of_only_a_header_is_not_said_to_lack_its_columns(tmp_path) -> None:
    file = write(tmp_path, "l.csv", "path,kind\n")
    try:
        read_labels(None, f"{file}:kind")
    except SourceError as error:
        assert "must have the columns" not in str(error)


# torch_pickle
@pytest.mark.parametrize(("shape", "stride"), [((2, 2), (-3, 4)), ((2, 2), (-1, 5))])
def test_a_negative_stride_does_not_read_before_the_storage(tmp_path, shape, stride) -> None:
    with pytest.raises(WeightsError):
        read(tmp_path, torch_file(state_dict(w=tensor("0", shape, stride)), {"0": FLOATS}))


@pytest.mark.parametrize(
    "state",
    [
        state_dict(epoch=b"K\x03"),
        state_dict(state_dict=state_dict(w=tensor("0", (2,), (1,)))[2:-1]),
        b"\x80\x02]K\x01a.",
    ],
    ids=["number among the tensors", "checkpoint with a nested state dict", "list"],
)
def test_another_object_than_a_state_dict_is_refused(tmp_path, state) -> None:
    with pytest.raises(WeightsError):
        read(tmp_path, torch_file(state, {"0": FLOATS} if b"Q" in state else {}))


@pytest.mark.parametrize("count", [2**60, 2**62])
def test_a_storage_that_declares_too_much_is_refused(tmp_path, count) -> None:
    start = len(SOUND) - 6 * 4 - 8
    with pytest.raises(WeightsError):
        read(tmp_path, SOUND[:start] + count.to_bytes(8, "little") + SOUND[start + 8 :])


# recipe
def test_a_missing_attribute_is_not_said_to_have_received_all_others() -> None:
    with pytest.raises(Exception) as caught:
        Recipe(backbone="b", image_size=(48, 64))
    assert "weights={" not in str(caught.value)
