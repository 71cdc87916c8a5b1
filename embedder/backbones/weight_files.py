"""Files of weights and of models: what is in them gets into a network, or is refused.

Only arrays are taken: HDF5 is read by name and shape, and a `.keras` file may hold nothing but
Keras's own layers. No code of a file is ever run.
"""

import os
import warnings
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedder.backbones import declared
from embedder.backbones.layers import leaf_layers, with_canonical_names
from embedder.errors import WeightsError
from embedder.libraries import import_keras, logger

if TYPE_CHECKING:
    import h5py
    import keras

_HDF5_BYTES = 8192  # besides its values, at most, of a variable in HDF5
_WEIGHTS_FILE = "model.weights.h5"  # in a `.keras` file
# A `.keras` file may name classes of these modules only, and none that runs code of its own.
_TRUSTED_MODULES = ("keras", "keras_hub", "builtins")
_CLASSES_WITH_CODE = {
    *("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "__lambda__"),
}


def save_network(network: "keras.Model", path: Path) -> None:
    """Write a network to a `.keras` file, or its weights to a `.weights.h5` file.

    Raises:
        OSError: It cannot be written.
    """
    if path.suffix != ".keras":
        # HDF5 that cannot write ends the process with it: what it needs is asked for before.
        num_bytes = sum(variable.numpy().nbytes + _HDF5_BYTES for variable in network.variables)
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
    with warnings.catch_warnings():
        # TensorFlow's variables are older than NumPy 2.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        (network.save if path.suffix == ".keras" else network.save_weights)(path)


# HDF5 ----------------------------------------------------------------------------------------


def load_hdf5(network: "keras.Model", path: Path) -> None:
    """Load `.weights.h5`, or a legacy `.h5` of weights or of a whole model, by layer name.

    Every layer of the network that has weights must find a layer of its name and shapes in the
    file; the file may hold more, such as a classifier. Names that Keras gives by counting, such as
    `conv2d_7`, are compared by their order. What matched is logged.

    Args:
        network: Built; its weights are replaced.
        path: The file.

    Raises:
        WeightsError: The file cannot be read or is of another network.
    """
    import h5py

    layers = {layer.name: layer for layer in leaf_layers(network) if layer.weights}
    try:
        with h5py.File(path, "r") as file:
            declared.check_hdf5(file, path.stat().st_size, path)
            arrays = with_canonical_names(dict(_arrays_by_layer(file)), layers.values())
            wanted = with_canonical_names(layers)
            _check_match(network, path, wanted, arrays)
            for name, layer in wanted.items():
                layer.set_weights([array[()] for array in arrays[name]])
                if hasattr(layer, "finalize_state"):  # Normalization keeps values made from them
                    layer.finalize_state()
    except (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path} is not a whole HDF5 file of weights: {error}") from error
    unused = sorted(arrays.keys() - wanted.keys())
    rest = f"; not used: {_shortened(unused)}" if unused else ""
    logger.info(
        "%s: %d of %d layers of %s matched by name%s",
        *(path, len(wanted), len(wanted), network.name, rest),
    )


def _check_match(
    network: "keras.Model",
    path: Path,
    wanted: "dict[str, keras.Layer]",
    arrays: "dict[str, list[h5py.Dataset]]",
) -> None:
    missing, misshapen = [], []
    for name, layer in wanted.items():
        shapes = [tuple(variable.shape) for variable in layer.weights]
        if name not in arrays:
            missing.append(name)
        elif (found := [array.shape for array in arrays[name]]) != shapes:
            misshapen.append(f"{name} has {found}, expected {shapes}")
    if not missing and not misshapen:
        return
    num_matched = len(wanted) - len(missing) - len(misshapen)
    raise WeightsError(
        f"{path} does not fit {network.name}: every one of its {len(wanted)} layers must find its "
        f"weights by name. Received: {num_matched} that match"
        + (f"; not in the file: {_shortened(missing)}" if missing else "")
        + (f"; of another shape: {_shortened(misshapen)}" if misshapen else "")
        + f". The file holds {len(arrays)} layers: {_shortened(list(arrays))}"
    )


def _shortened(names: list[str]) -> str:
    shown = 3
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _arrays_by_layer(file: "h5py.File") -> "Iterator[tuple[str, list[h5py.Dataset]]]":
    root = file.get("model_weights", file)
    if "layer_names" in root.attrs or "layer_names0" in root.attrs:
        yield from _legacy_arrays(root)
    else:
        yield from _arrays_of_group(root)


def _legacy_arrays(root: "h5py.Group") -> "Iterator[tuple[str, list[h5py.Dataset]]]":
    for group_name in _text_attribute(root, "layer_names"):
        group = root[group_name]
        by_layer = defaultdict(list)
        for path in _text_attribute(group, "weight_names"):
            array = group
            for part in path.split("/"):
                array = array[part]
            by_layer[path.rpartition("/")[0].rpartition("/")[2]].append(array)
        # A model within the model has one group for all its layers; the one layer of any other
        # group can be called otherwise there, such as with a number behind its name.
        if len(by_layer) == 1:
            yield group_name, next(iter(by_layer.values()))
        else:
            yield from by_layer.items()


def _text_attribute(group: "h5py.Group", name: str) -> list[str]:
    """A list of names; one too long for HDF5's header is kept in parts `name0`, `name1`, ..."""
    if name in group.attrs:
        parts = [group.attrs[name]]
    else:
        parts = []
        while f"{name}{len(parts)}" in group.attrs:
            parts.append(group.attrs[f"{name}{len(parts)}"])
    return [
        text.decode() if isinstance(text, bytes) else str(text) for part in parts for text in part
    ]


def _arrays_of_group(group: "h5py.Group") -> "Iterator[tuple[str, list[h5py.Dataset]]]":
    for name, member in group.items():
        if name == "vars":
            layer_name = member.attrs.get("name", group.name.rpartition("/")[2])
            if arrays := [member[key] for key in sorted(member, key=int)]:
                yield str(layer_name), arrays
        elif hasattr(member, "keys"):
            yield from _arrays_of_group(member)


# Keras's own format --------------------------------------------------------------------------


def load_keras_model(path: Path) -> "keras.Model":
    """Load a `.keras` model that holds nothing but Keras's own layers.

    Raises:
        WeightsError: The file is damaged, or holds a Lambda layer, a custom object or anything
            else that could run code.
    """
    config, num_bytes = _read_archive(path)
    check_configuration(config, path)
    declared.check_network(config, num_bytes, path)
    keras = import_keras()
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises what its layers raise
        raise WeightsError(f"{path} cannot be loaded: {error}") from error
    if not isinstance(model, keras.Model) or len(getattr(model, "inputs", None) or ()) != 1:
        raise WeightsError(f"{path} must hold a model with one input, the pixels")
    return model


def _read_archive(path: Path) -> tuple[Any, int]:
    """The configuration of a `.keras` file, and how many bytes of weights it holds.

    Raises:
        WeightsError: It is damaged, or declares more than it holds.
    """
    import h5py

    try:
        with zipfile.ZipFile(path) as archive:
            declared.check_archive(archive, path)
            with archive.open("config.json") as file:
                config = declared.parse_json(file.read(declared.MAX_JSON_BYTES + 1))
            if not isinstance(config, dict):
                raise ValueError("its configuration is no object")
            num_bytes = archive.getinfo(_WEIGHTS_FILE).file_size
            with archive.open(_WEIGHTS_FILE) as file, h5py.File(file, "r") as arrays:
                declared.check_hdf5(arrays, num_bytes, path)
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{path} is not a whole .keras file: {error}") from error
    return config, num_bytes


def check_configuration(config: Any, path: Path) -> None:
    """Check that a model's configuration names nothing that could run code of its own.

    Raises:
        WeightsError: It does.
    """
    if refused := sorted(set(_refused_objects(config))):
        raise WeightsError(
            f"A model's file must hold Keras's own layers only: Lambda layers and custom objects "
            f"could run code. Received: {path} with {', '.join(refused)}"
        )


def _refused_objects(config: Any) -> Iterator[str]:
    """Names of classes in a model's configuration that are not trusted."""
    for _, value, _ in declared.walk(config):
        if not isinstance(value, dict) or "class_name" not in value:
            continue
        name, module = str(value["class_name"]), str(value.get("module") or "builtins")
        registered = str(value.get("registered_name") or "")
        package = registered.partition(">")[0] if ">" in registered else "keras"
        are_trusted = {module.split(".")[0], package} <= set(_TRUSTED_MODULES)
        if not are_trusted or name in _CLASSES_WITH_CODE:
            yield name
