"""Legacy PyTorch files: arrays are read right, and nothing in the file can run.

The files are written here opcode by opcode, in protocol 2, as `torch.save` did before 1.6.
"""

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.backbones.torch_weights import read_state_dict
from embedder.errors import WeightsError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
FACTS = {"protocol_version": 1001, "little_endian": True}


def opcodes(value: Any) -> bytes:
    """A plain value, as a part of a pickle."""
    return pickle.dumps(value, 2).removeprefix(b"\x80\x02").removesuffix(b".")


def whole(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def tensor(
    key: str,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    kind: bytes = name_of("torch", "FloatStorage"),
) -> bytes:
    """As `torch` pickles a tensor: a call with a persistent id, which stands for the storage."""
    storage = b"(" + opcodes("storage") + kind + opcodes(key) + opcodes("cpu") + opcodes(0) + b"NtQ"
    geometry = opcodes(offset) + opcodes(shape) + opcodes(stride)
    hooks = opcodes(False) + call(name_of("collections", "OrderedDict"))
    return call(name_of("torch._utils", "_rebuild_tensor_v2"), storage, geometry, hooks)


def state_dict(**tensors: bytes) -> bytes:
    items = b"".join(opcodes(name) + value for name, value in tensors.items())
    metadata = opcodes({"_metadata": {"": {"version": 1}}})  # `torch` hangs it on the dict
    return whole(call(name_of("collections", "OrderedDict")), b"(", items, b"u", metadata, b"b")


def torch_file(
    state: bytes,
    storages: dict[str, NDArray[Any]],
    magic_number: int = MAGIC_NUMBER,
    version: int = 1001,
    keys: bytes | None = None,
) -> bytes:
    header = [pickle.dumps(value, 2) for value in (magic_number, version, FACTS)]
    content = [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    return b"".join([*header, state, keys or pickle.dumps(list(storages), 2), *content])


def read(folder: Path, content: bytes) -> dict[str, NDArray[Any]]:
    file = folder / "weights.pth"
    file.write_bytes(content)
    return read_state_dict(file)


FLOATS = np.arange(24, dtype="<f4")
SOUND = torch_file(state_dict(weight=tensor("0", (2, 3), (3, 1))), {"0": FLOATS[:6]})


# Arrays ----------------------------------------------------------------------------------------


def test_arrays_come_in_the_files_order_with_their_values_and_types(tmp_path: Path) -> None:
    state = state_dict(
        weight=tensor("11", (2, 3), (3, 1)),
        bias=tensor("7", (3,), (1,)),
        count=tensor("9", (), (), kind=name_of("torch", "LongStorage")),
        nothing=tensor("8", (0, 3), (3, 1)),
    )
    storages = {  # `torch` sorts the keys as text, and not in the order of the tensors
        "11": np.array([1, 2, 3, 4, 5, 6.5], "<f4"),
        "7": np.array([-1, 0, 1], "<f4"),
        "8": np.array([], "<f4"),
        "9": np.array([2**40], "<i8"),
    }
    arrays = read(tmp_path, torch_file(state, storages))
    assert list(arrays) == ["weight", "bias", "count", "nothing"]
    np.testing.assert_array_equal(arrays["weight"], [[1, 2, 3], [4, 5, 6.5]])
    np.testing.assert_array_equal(arrays["bias"], [-1, 0, 1])
    assert arrays["weight"].dtype == np.float32
    assert (arrays["count"].shape, arrays["count"].dtype, int(arrays["count"])) == (
        (),
        np.int64,
        2**40,
    )
    assert arrays["nothing"].shape == (0, 3)


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "expected"),
    [
        ((2, 3), (3, 1), 4, FLOATS[4:10].reshape(2, 3)),
        ((3, 2), (1, 3), 0, FLOATS[:6].reshape(2, 3).T),
        ((2, 2), (12, 5), 3, [[3, 8], [15, 20]]),
        ((2, 3), (1, 0), 1, [[1, 1, 1], [2, 2, 2]]),
        ((2, 3, 4), (12, 4, 1), 0, FLOATS.reshape(2, 3, 4)),
        ((1,), (1,), 23, [23]),
    ],
    ids=["offset", "transposed", "gaps", "expanded", "whole storage", "last element"],
)
def test_shape_stride_and_offset_place_a_tensor_in_its_storage(
    tmp_path: Path,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    expected: NDArray[Any],
) -> None:
    content = torch_file(state_dict(weight=tensor("0", shape, stride, offset)), {"0": FLOATS})
    np.testing.assert_array_equal(read(tmp_path, content)["weight"], expected)


def test_tensors_may_share_a_storage(tmp_path: Path) -> None:
    state = state_dict(first=tensor("0", (2,), (1,)), second=tensor("0", (3,), (2,), 1))
    arrays = read(tmp_path, torch_file(state, {"0": FLOATS}))
    np.testing.assert_array_equal(arrays["first"], [0, 1])
    np.testing.assert_array_equal(arrays["second"], [1, 3, 5])


def test_arrays_cannot_be_written_to(tmp_path: Path) -> None:
    assert not read(tmp_path, SOUND)["weight"].flags.writeable


# Files that ask for more -----------------------------------------------------------------------


def hostile(module: str, name: str, folder: Path) -> tuple[bytes, Path]:
    """Opcodes that call the function with an argument that would leave a mark, and the mark."""
    mark = folder / "mark"
    argument = {
        "system": f"echo > {mark}",
        "eval": f"open({str(mark)!r}, 'w').close()",
        "exec": f"open({str(mark)!r}, 'w').close()",
        "mkdir": str(mark),
    }.get(name, "")
    return call(name_of(module, name), opcodes(argument)), mark


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("os", "mkdir"),
    ],
)
@pytest.mark.parametrize("place", ["magic number", "version", "facts", "state", "value", "keys"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(
    tmp_path: Path, module: str, name: str, place: str
) -> None:
    payload, mark = hostile(module, name, tmp_path)
    pickle.loads(whole(payload))
    assert mark.exists()  # so the payload is a real one
    if mark.is_dir():
        mark.rmdir()
    else:
        mark.unlink()

    header = [pickle.dumps(value, 2) for value in (MAGIC_NUMBER, 1001, FACTS)]
    if place in ("magic number", "version", "facts"):
        header[["magic number", "version", "facts"].index(place)] = whole(payload)
    sound = state_dict(weight=tensor("0", (2,), (1,)))
    state = {"state": whole(payload), "value": state_dict(weight=payload)}.get(place, sound)
    keys = whole(payload) if place == "keys" else pickle.dumps(["0"], 2)
    content = b"".join([*header, state, keys, struct.pack("<q", 2), FLOATS[:2].tobytes()])

    with pytest.raises(WeightsError, match=rf"weights\.pth .*asks for {module}\.{name}, which"):
        read(tmp_path, content)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "DoubleStorage"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "OrderedDict"),
        ("collections", "Counter"),
        ("collections", "FloatStorage"),
        ("numpy", "frombuffer"),
        ("builtins", "getattr"),
        ("embedder.backbones.torch_weights", "read_state_dict"),
    ],
)
def test_any_other_name_is_refused(tmp_path: Path, module: str, name: str) -> None:
    content = torch_file(state_dict(weight=name_of(module, name)), {})
    with pytest.raises(WeightsError, match=rf"asks for {module}\.{name}, which a state dict never"):
        read(tmp_path, content)


def test_no_name_is_reached_through_one_that_is_admitted(tmp_path: Path) -> None:
    dotted = opcodes("collections") + opcodes("OrderedDict.__init__.__globals__") + b"\x93"
    content = torch_file(b"\x80\x04" + dotted + b".", {})
    with pytest.raises(WeightsError, match=r"asks for collections\.OrderedDict\.__init__"):
        read(tmp_path, content)


def test_an_unknown_persistent_id_is_refused(tmp_path: Path) -> None:
    reference = b"(" + opcodes("module") + opcodes("a") + opcodes("b") + b"tQ"
    with pytest.raises(WeightsError, match="unknown persistent id 'module'"):
        read(tmp_path, torch_file(state_dict(weight=reference), {}))


# Damaged files ---------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    assert list(read(tmp_path, SOUND)) == ["weight"]
    for num_bytes in range(len(SOUND)):
        with pytest.raises(WeightsError, match=r"weights\.pth is not a legacy PyTorch state dict"):
            read(tmp_path, SOUND[:num_bytes])


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((25,), (1,), 0),
        ((24,), (1,), 1),
        ((1,), (1,), 24),
        ((1,), (1,), 1000),
        ((5, 5), (5, 1), 0),
        ((2, 2), (23, 1), 0),
        ((2,), (24,), 0),
        ((2,), (-1,), 0),
        ((), (), 24),
        ((2**40, 2**40), (2**40, 1), 0),
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(
    tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    content = torch_file(state_dict(weight=tensor("0", shape, stride, offset)), {"0": FLOATS})
    with pytest.raises(WeightsError, match="outside its storage|has offset"):
        read(tmp_path, content)


@pytest.mark.parametrize("stride", [(1,), (3, 1, 1)])
def test_a_tensor_of_more_or_fewer_strides_than_axes_is_refused(
    tmp_path: Path, stride: tuple[int, ...]
) -> None:
    content = torch_file(state_dict(weight=tensor("0", (2, 3), stride)), {"0": FLOATS})
    with pytest.raises(WeightsError, match="is not a legacy PyTorch state dict"):
        read(tmp_path, content)


def test_a_storage_shorter_than_it_says_is_refused_though_no_tensor_needs_its_end(
    tmp_path: Path,
) -> None:
    content = torch_file(state_dict(weight=tensor("0", (2,), (1,))), {"0": FLOATS})
    with pytest.raises(WeightsError, match="buffer is smaller than requested"):
        read(tmp_path, content[: -FLOATS.itemsize])


def test_a_tensor_without_its_storage_is_refused(tmp_path: Path) -> None:
    state = state_dict(weight=tensor("0", (2,), (1,)), bias=tensor("1", (2,), (1,)))
    with pytest.raises(WeightsError, match="is not a legacy PyTorch state dict: '1'"):
        read(tmp_path, torch_file(state, {"0": FLOATS}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Not Found",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"PK\x03\x04" + bytes(64),
        bytes(64),
        b"\xff" * 64,
        b"<!DOCTYPE html>\n",
    ],
    ids=["empty", "text", "PNG", "zip, as since PyTorch 1.6", "zeros", "ones", "HTML"],
)
def test_what_is_not_a_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(WeightsError, match=r"weights\.pth is not a legacy PyTorch state dict: ."):
        read(tmp_path, content)


def test_another_magic_number_is_refused(tmp_path: Path) -> None:
    content = torch_file(state_dict(), {}, magic_number=MAGIC_NUMBER + 1)
    with pytest.raises(WeightsError, match=f"unexpected header {MAGIC_NUMBER + 1}, 1001"):
        read(tmp_path, content)


def test_another_protocol_version_is_refused(tmp_path: Path) -> None:
    content = torch_file(state_dict(), {}, version=1002)
    with pytest.raises(WeightsError, match=f"unexpected header {MAGIC_NUMBER}, 1002"):
        read(tmp_path, content)


@pytest.mark.parametrize(("shape", "stride"), [((2, 2), (-3, 4)), ((2, 2), (-1, 5))])
def test_a_negative_stride_does_not_read_before_the_storage(
    tmp_path: Path, shape: tuple[int, int], stride: tuple[int, int]
) -> None:
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
def test_another_object_than_a_state_dict_is_refused(tmp_path: Path, state: bytes) -> None:
    with pytest.raises(WeightsError):
        read(tmp_path, torch_file(state, {"0": FLOATS} if b"Q" in state else {}))


@pytest.mark.parametrize("count", [2**60, 2**62])
def test_a_storage_that_declares_too_much_is_refused(tmp_path: Path, count: int) -> None:
    start = len(SOUND) - 6 * 4 - 8
    with pytest.raises(WeightsError):
        read(tmp_path, SOUND[:start] + count.to_bytes(8, "little") + SOUND[start + 8 :])
