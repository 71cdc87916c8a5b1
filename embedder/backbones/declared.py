"""What a model's file declares, held against what it holds, before anything is read or built.

A file of a few kilobytes can declare gigabytes: a network of layers without their weights, an
array of zeros that are not stored, an archive that unpacks to a thousand times its size.
"""

import copy
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from embedder.errors import WeightsError
from embedder.files import regular
from embedder.libraries import import_keras

if TYPE_CHECKING:
    import h5py
    import keras

MAX_JSON_BYTES = 16 * 2**20  # NASNet-Large, the longest of `keras.applications`, has 1.0 MB
MAX_DEPTH = 100  # of values within values; NASNet-Large has 13
MAX_INTEGER = 2**20  # units, sizes, repetitions; a Reshape of 7x7x2048 has 100,352
MAX_VALUES = 2**31  # of a layer's output for one image: 8 GiB
MAX_EXPANSION = 20  # times what is stored; trained weights are not made shorter than 9/10
_SLACK_BYTES = 2**20


def parse_json(content: bytes, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read JSON that is neither too long nor too deep.

    Raises:
        ValueError: It is, or it is no JSON.
    """
    if len(content) > max_bytes:
        raise ValueError(f"longer than {max_bytes:,} bytes")
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    if any(depth > MAX_DEPTH for _, _, depth in walk(values)):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return values


def read_json(path: Path) -> Any:
    """Read a JSON file; see `parse_json`.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too long, too deep, or no JSON.
    """
    with regular(path).open("rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1))


def walk(values: Any) -> Iterator[tuple[str, Any, int]]:
    """All values within values of JSON, each with its name, or that of its list, and its depth."""
    left = [("", values, 0)]
    while left:
        name, value, depth = left.pop()
        yield name, value, depth
        if isinstance(value, dict):
            left += [(str(key), inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(name, inner, depth + 1) for inner in value]


# Archives ------------------------------------------------------------------------------------


def check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse an archive that unpacks to far more than it is, or has two members of one name.

    Raises:
        WeightsError: It does.
    """
    members = archive.infolist()
    num_held = sum(member.compress_size for member in members)
    num_declared = sum(member.file_size for member in members)
    if num_declared > MAX_EXPANSION * num_held + _SLACK_BYTES:
        raise WeightsError(_too_much(path, "unpacked", num_declared, num_held))
    if len({member.filename for member in members}) < len(members):
        raise WeightsError(f"{path} has two members of one name")


def check_arrays_of_archive(content: bytes, path: Path) -> None:
    """Refuse an archive of NumPy's arrays, such as a head of skops, that declare what is not there.

    Raises:
        WeightsError: It does, or is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_archive(archive, path)
            for member in archive.infolist():
                if member.filename.endswith(".npy"):
                    with archive.open(member) as file:
                        num_declared = _num_array_bytes(file)
                    if num_declared > member.file_size:
                        raise WeightsError(_too_much(path, "arrays", num_declared, len(content)))
                elif not member.filename.endswith((".json", ".bin")):
                    raise WeightsError(
                        f"{path} must hold arrays only, and {member.filename} is none"
                    )
            schema = archive.read("schema.json")  # some 20 kB for each of several labels
            parse_json(schema, max_bytes=len(schema))
    except (KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{path} is not a whole file of a head: {error}") from error


def _num_array_bytes(file: IO[bytes]) -> int:
    """Bytes of the array that a `.npy` file begins with.

    Raises:
        ValueError: It is none.
    """
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"an array of format {version}")
    shape, _, dtype = read[version](file)
    return math.prod(shape) * dtype.itemsize


def _too_much(path: Path, what: str, num_declared: int, num_held: int) -> str:
    return (
        f"A model's file must hold what it declares. Received: {path}, which declares "
        f"{num_declared:,} bytes ({what}), and holds {num_held:,}"
    )


# HDF5 ----------------------------------------------------------------------------------------


def check_hdf5(file: "h5py.File", num_bytes: int, path: Path) -> None:
    """Refuse HDF5 whose arrays are not held by the file itself, or are larger than what is.

    Args:
        file: Opened.
        num_bytes: Of the file.
        path: What to call it.

    Raises:
        WeightsError: It has links to other files, a group within itself, or such arrays.
    """
    import h5py

    num_declared, seen, left = 0, set(), [file["/"]]
    while left:
        group = left.pop()
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise WeightsError(f"{path}: {group.name}/{name} is not held by the file")
            member = group[name]
            if isinstance(member, h5py.Dataset):
                if member.external or member.is_virtual:
                    raise WeightsError(f"{path}: {member.name} points to another file")
                num_declared += member.size * member.dtype.itemsize
            elif isinstance(member, h5py.Group):
                left.append(member)
            place = h5py.h5o.get_info(member.id).addr
            if place in seen:
                raise WeightsError(f"{path}: {member.name} is held twice")
            seen.add(place)
    if num_declared > MAX_EXPANSION * num_bytes + _SLACK_BYTES:
        raise WeightsError(_too_much(path, "arrays", num_declared, num_bytes))


# Networks ------------------------------------------------------------------------------------


def check_network(config: Any, num_bytes: int, path: Path) -> None:
    """Refuse a network with more weights than its file holds, or with outputs of gigabytes.

    The network is put together without its weights: for that Keras needs no memory.

    Args:
        config: Of a `.keras` file.
        num_bytes: Of the weights that it holds.
        path: The file.

    Raises:
        WeightsError: It declares more, or Keras cannot put it together.
    """
    for name, value, _ in walk(config):
        is_size = isinstance(value, int) and name != "shared_object_id" and "seed" not in name
        if is_size and abs(value) > MAX_INTEGER:
            raise WeightsError(
                f"A network's numbers must be at most {MAX_INTEGER:,}. "
                f"Received: {path} with {name} = {value:,}"
            )
    network = _without_weights(copy.deepcopy(config) | {"compile_config": None}, path)
    name_of = import_keras().backend.standardize_dtype
    num_declared = sum(
        math.prod(variable.shape) * _num_bits(name_of(variable.dtype)) // 8
        for variable in network.variables
    )
    if num_declared > num_bytes:
        raise WeightsError(_too_much(path, "weights", num_declared, num_bytes))
    for name, num_values in _sizes_of_outputs(network):
        if num_values > MAX_VALUES:
            raise WeightsError(
                f"A layer must give at most {MAX_VALUES:,} values for an image. "
                f"Received: {path}, whose {name} gives {num_values:,}"
            )


def _num_bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)  # such as of float8_e4m3fn
    return int(found[0]) if found else 8


def _without_weights(config: Any, path: Path) -> Any:
    keras = import_keras()

    def make() -> Any:
        with keras.StatelessScope(initialize_variables=False):
            return keras.saving.deserialize_keras_object(config, safe_mode=True)

    # Keras remembers variables that are yet to have values, for each thread: here they have none.
    with ThreadPoolExecutor(1) as executor:
        try:
            network = executor.submit(make).result()
        except Exception as error:  # Keras raises what its layers raise
            raise WeightsError(f"{path} cannot be loaded: {error}") from error
    if not isinstance(network, keras.Model):
        raise WeightsError(f"{path} holds no network")
    return network


def _sizes_of_outputs(network: "keras.Model") -> Iterator[tuple[str, int]]:
    """Names of layers, and how many values they give for an image, as far as that is known."""
    keras = import_keras()
    # Sums and the like are operations without a layer; a Sequential has layers alone.
    for operation in getattr(network, "operations", network.layers):
        if hasattr(operation, "layers"):
            yield from _sizes_of_outputs(operation)
            continue
        try:
            tensors = keras.tree.flatten(operation.output)
        except AttributeError:  # it is not connected to anything yet
            continue
        for tensor in tensors:
            yield operation.name, math.prod(side or 1 for side in tensor.shape[1:])
