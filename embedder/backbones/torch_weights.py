"""Arrays from a legacy (before zip) PyTorch file, without PyTorch and without running its code.

Such a file is four pickles (a magic number, a protocol version, facts of the writing system, the
state dict), then a pickled list of storage keys, then each storage as an element count (int64)
followed by its raw elements. The unpickler below admits the few names that a plain state dict
needs, and hands out descriptions where PyTorch would build tensors.
"""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedder.errors import WeightsError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_STORAGE_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class _Tensor(NamedTuple):
    storage_key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(
    storage: tuple[Any, ...], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _Tensor:
    return _Tensor(storage[0], offset, shape, stride)


class _StateDictUnpickler(pickle.Unpickler):
    """Admits ordered dicts, tensor descriptions and two storage types; refuses any other name."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.dtypes: dict[str, np.dtype[Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a state dict never needs")

    def persistent_load(self, pid: Any) -> tuple[str]:
        kind, dtype, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        self.dtypes[key] = dtype
        return (key,)


def read_state_dict(path: Path) -> dict[str, NDArray[Any]]:
    """Read every array of a legacy PyTorch state dict.

    Args:
        path: A file written by `torch.save(model.state_dict())` before PyTorch 1.6.

    Returns:
        Arrays by name, in the file's order, in PyTorch's own axis order.

    Raises:
        WeightsError: The file is not such a state dict, is truncated, or asks for anything that
            a state dict does not need.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    # A damaged pickle can raise nearly anything, from AttributeError to MemoryError.
    except Exception as error:
        raise WeightsError(f"{path} is not a legacy PyTorch state dict: {error}") from error


def _read(file: BinaryIO) -> dict[str, NDArray[Any]]:
    # The system facts (third pickle) say how the writer was built; elements are little-endian.
    magic_number, version, _ = (_StateDictUnpickler(file).load() for _ in range(3))
    if (magic_number, version) != (_MAGIC_NUMBER, _PROTOCOL_VERSION):
        raise ValueError(f"unexpected header {magic_number!r}, {version!r}")
    unpickler = _StateDictUnpickler(file)
    tensors = unpickler.load()
    if not isinstance(tensors, dict) or not all(isinstance(t, _Tensor) for t in tensors.values()):
        raise ValueError("it holds something other than tensors by name")
    storages = {}
    for key in _StateDictUnpickler(file).load():
        dtype = unpickler.dtypes[key]
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        storages[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
    return {name: _as_array(tensor, storages) for name, tensor in tensors.items()}


def _as_array(tensor: _Tensor, storages: dict[str, NDArray[Any]]) -> NDArray[Any]:
    storage = storages[tensor.storage_key]
    if tensor.offset < 0 or min(tensor.stride, default=0) < 0:
        raise ValueError(f"a tensor has offset {tensor.offset} and strides {tensor.stride}")
    elements = storage[tensor.offset :]
    needed = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
    if min(tensor.shape, default=1) > 0 and not 0 < needed <= len(elements):
        raise ValueError(f"a tensor of shape {tensor.shape} reaches outside its storage")
    strides = tuple(step * storage.itemsize for step in tensor.stride)
    return np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)
