"""The sections of gpu.py that measure this package; see its docstring."""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference import NETWORKS, PUBLISHED, cosines, load_reference
from runs import Run, extract
from sections import (
    ROOT,
    Monitor,
    NotMeasuredError,
    Section,
    affordable_rows,
    in_windows,
    is_installed,
    random_pixels,
    run_section,
    serve,
    spread_of,
    sweep,
)

import embedder
from embedder import engines
from embedder.backbones import make_recipe
from embedder.columns import EMBEDDING
from embedder.extraction.buffers import SharedBatches
from embedder.extraction.decoders import DecoderPool, Feeding
from embedder.extraction.record import Work
from embedder.libraries import import_keras
from embedder.machine import gpus, num_cores
from embedder.recipe import Recipe

VIT = "vit-b16"  # KerasHub's ViT-B/16 of 224x224 pixels, with random weights
NUM_BATCHES = 4  # different ones, in memory


def recipe_of(network: str, precision: str, section: Section) -> Recipe:
    """The network with the weights that are there: random ones, but for Lite0."""
    if network == VIT:
        folder = vit_folder(Path(section.settings["scratch"]))
        return make_recipe(f"hub:{folder}", precision=precision)
    size = section.settings["image_size"]
    weights = None if network == "efficientnet-lite0" else "random:0"
    return make_recipe(network, weights, precision=precision, image_size=size and tuple(size))


def vit_folder(scratch: Path) -> Path:
    """The preset of ViT-B/16, made once."""
    folder = scratch / VIT
    if folder.exists():
        return folder
    if not is_installed("keras_hub"):
        raise NotMeasuredError("no keras_hub")
    import_keras()
    import keras_hub

    network = keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=(16, 16),
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
    )
    new = folder.with_suffix(".new")
    network.save_to_preset(str(new))
    converter = keras_hub.layers.ViTImageConverter(
        image_size=(224, 224), scale=1 / 127.5, offset=-1.0
    )
    converter.save_to_preset(str(new))
    new.rename(folder)
    return folder


def load_engine(
    name: str, recipe: Recipe, batch_size: int, section: Section, cores: int | None = None
) -> Any:
    """The engine, on the card where there is one: nothing else may be taken for it."""
    engine = engines.load(recipe, engines.choose(name, gpus()), batch_size, cores or num_cores())
    if name != "openvino" and section.settings["card"] and engine.device == "CPU":
        raise NotMeasuredError(f"{name} does not use the card")
    return engine


# Checks. -----------------------------------------------------------------------------------------


def vectors(section: Section) -> None:
    """Vectors of one engine beside the reference, and of a second call beside the first."""
    settings = section.settings
    for network in settings["reference_networks"]:
        for precision in settings["precisions"]:
            section.measure(
                check_vectors, engine=settings["engine"], network=network, precision=precision
            )


def check_vectors(section: Section, engine: str, network: str, precision: str) -> dict[str, Any]:
    images, reference = load_reference()
    backbone, weights = NETWORKS[network]
    if weights == PUBLISHED:
        weights = section.settings["mobilenet_weights"]
        if weights is None:
            raise NotMeasuredError("no file of its weights was given")
    recipe = make_recipe(backbone, weights, precision=precision)
    loaded = load_engine(engine, recipe, len(images), section)
    found = [loaded.embed(images)[EMBEDDING] for _ in range(2)]
    return {
        "device": loaded.device,
        "cosine": float(cosines(found[0], reference[network]).min()),
        "again": float(cosines(found[0], found[1]).min()),
        "again_is_equal": bool(np.array_equal(*found)),
    }


def repeated(section: Section) -> None:
    """Two runs of the command line beside each other, and one that does not fit into memory."""
    (Path(section.settings["scratch"]) / "repeated").mkdir()
    section.measure(two_runs, check="two runs")
    section.measure(run_out_of_memory, check="out of memory")


def two_runs(section: Section, check: str) -> dict[str, Any]:  # noqa: ARG001
    names = ("first", "second")
    ran = [run_command(section, name, num_repeated(section)) for name in names]
    seconds = [round(run.record["seconds_total"], 2) for run in ran]
    return {"seconds": seconds, **difference(section, *names)}


def run_out_of_memory(section: Section, check: str) -> dict[str, Any]:  # noqa: ARG001
    """XLA gets so little memory that a batch far too large cannot fit.

    The run must end well all the same, with a smaller batch and the same vectors.
    """
    settings = section.settings
    if not settings["card"]:
        raise NotMeasuredError("no card: XLA limits the memory of cards alone")
    if not settings["card"]["memory_bytes"]:
        raise NotMeasuredError("the card does not tell its memory")
    asked, limit = settings["large_batch_size"], settings["memory_limit_bytes"]
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{limit / settings['card']['memory_bytes']:.4f}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
    }
    found = run_command(section, "limited", asked, environment).record["batch_size"]
    row = {"limit_bytes": limit, "asked": asked, "batch_size": found}
    row |= difference(section, "first", "limited")
    if found == asked:
        row["reason"] = "the limit was not met: the batch fitted, and was not halved"
    return row


def num_repeated(section: Section) -> int:
    return int(min(64, section.settings["rows"]))


def run_command(
    section: Section, name: str, batch_size: int, environment: dict[str, str] | None = None
) -> Run:
    """One run of the command line over some photographs, into a store of this name."""
    settings = section.settings
    network = settings["light_network"]
    options = ["--engine", settings["engine"], "--backbone", network]
    options += [] if network == "efficientnet-lite0" else ["--weights", "random:0"]
    if settings["image_size"]:
        options += ["--image-size", "x".join(map(str, settings["image_size"]))]
    options += ["--limit", str(num_repeated(section)), "--batch-size", str(batch_size)]
    store = Path(settings["scratch"]) / "repeated" / name
    return extract(ROOT, settings["many_photos"], store, *options, environment=environment)


def difference(section: Section, *names: str) -> dict[str, Any]:
    """Of two stores of the same images."""
    folder = Path(section.settings["scratch"]) / "repeated"
    stores = [embedder.open_store(folder / name) for name in names]
    mine, others = ((store.vectors(), store.ids()) for store in stores)
    if list(mine[1]) != list(others[1]):
        raise ValueError("the stores are not of the same images")
    return {
        "rows": len(mine[1]),
        "equal": bool(np.array_equal(mine[0], others[0])),
        "cosine": float(cosines(mine[0], others[0]).min()),
    }


# The network alone. ------------------------------------------------------------------------------


def inference(section: Section) -> None:
    """Images per second of the engine: pixels in the host's memory, and on the card already."""
    for what in sweep(section.settings):
        section.measure(network_speed, **what)


def network_speed(
    section: Section, network: str, precision: str, batch_size: int
) -> dict[str, Any]:
    settings = section.settings
    begin = time.perf_counter()
    recipe = recipe_of(network, precision, section)
    if recipe in loaded_engines:
        engine = loaded_engines[recipe].resized(batch_size)
    else:
        engine = load_engine(settings["engine"], recipe, batch_size, section)
        loaded_engines[recipe] = engine
    row = {"compile_seconds": round(time.perf_counter() - begin, 1), "device": engine.device}
    row |= {"batch_size": engine.batch_size, "parallel": engine.num_parallel}
    batches = random_batches(engine.batch_size, recipe.image_size)
    row |= {"gflops": gflops_of(engine, batches[0]), "pixels": str(recipe.pixels)}
    row |= in_windows(lambda: speed_of(engine, batches, settings["seconds"]), settings)
    if hasattr(engine, "upload"):
        uploaded = [engine.upload(batch) for batch in batches]
        for batch in uploaded:
            getattr(batch, "block_until_ready", lambda: None)()  # JAX's are on their way there
        found = in_windows(lambda: speed_of(engine, uploaded, settings["seconds"] / 2), settings)
        row["speed_on_device"] = found["speed"]
    return row


def gflops_of(engine: Any, batch: NDArray[np.uint8]) -> float | None:
    """Work of an image in 10**9 operations: of convolutions and products, as PyTorch counts it."""
    if engine.name != "jax":
        return None
    import jax

    program = jax.make_jaxpr(engine._run)(engine._arrays, batch)
    return round(operations_of(program.jaxpr) / len(batch) / 1e9, 2)


def operations_of(program: Any) -> int:
    """Multiplications and additions of a program of JAX, and of those that it calls."""
    total = 0
    for step in program.eqns:
        inner = [value for value in step.params.values() if hasattr(value, "jaxpr")]
        total += sum(operations_of(one.jaxpr) for one in inner)
        if step.primitive.name == "conv_general_dilated":
            kernel = step.invars[1].aval
            num_filters = kernel.shape[step.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * step.outvars[0].aval.size * kernel.size // num_filters
        elif step.primitive.name == "dot_general":
            (summed, _), _ = step.params["dimension_numbers"]
            lengths = [step.invars[0].aval.shape[axis] for axis in summed]
            total += 2 * step.outvars[0].aval.size * int(np.prod(lengths))
    return total


loaded_engines: dict[Recipe, Any] = {}  # a network is built once for all batch sizes


def random_batches(batch_size: int, image_size: Sequence[int]) -> list[NDArray[np.uint8]]:
    """In memory of the kind that decoders write into."""
    batches = SharedBatches(NUM_BATCHES, (batch_size, *image_size, 3)).batches
    for number, batch in enumerate(batches):
        batch[:] = random_pixels(batch.shape, number)
    return batches


def speed_of(engine: Any, batches: Sequence[Any], seconds: float) -> float:
    """Images per second of so many threads as the engine takes, for so long and a call each."""
    num_threads = engine.num_parallel
    engine.embed(batches[0])

    def repeat(first: int) -> int:
        number = first
        while number == first or time.perf_counter() - begin < seconds:
            engine.embed(batches[number % NUM_BATCHES])
            number += num_threads
        return (number - first) // num_threads

    with ThreadPoolExecutor(num_threads) as threads:
        begin = time.perf_counter()
        num_calls = sum(threads.map(repeat, range(num_threads)))
        return round(num_calls * engine.batch_size / (time.perf_counter() - begin), 1)


# Decoding alone. ---------------------------------------------------------------------------------


def decoding(section: Section) -> None:
    """Images per second of decoder processes, whose pixels nobody takes."""
    for num_decoders in section.settings["decoders"]:
        section.measure(pool_speed, decoders=num_decoders, cores=num_cores())


def pool_speed(section: Section, decoders: int, cores: int) -> dict[str, Any]:  # noqa: ARG001
    return decoding_speed(section.settings, decoders)


def decoding_speed(settings: dict[str, Any], num_decoders: int) -> dict[str, Any]:
    """Images per second, and what one takes of the cores; a warm-up is not counted."""
    photos = sorted(os.fsencode(path) for path in Path(settings["many_photos"]).iterdir())
    paths = list(itertools.islice(itertools.cycle(photos), settings["decoded"] * num_decoders))
    pool = DecoderPool(make_recipe().pixels, 64, 8, num_decoders, Feeding())
    decode(pool, paths[: 32 * num_decoders], Work())
    work, num_images = Work(), 0

    def window() -> float:
        nonlocal num_images
        begin, before = time.perf_counter(), num_images
        while num_images == before or time.perf_counter() - begin < settings["seconds"]:
            decode(pool, paths, work)
            num_images += len(paths)
        return (num_images - before) / (time.perf_counter() - begin)

    found = in_windows(window, settings)
    return found | {"cpu_milliseconds": round(1000 * work.decode_cpu_seconds / num_images, 3)}


def decode(pool: DecoderPool, paths: list[bytes], work: Work) -> None:
    """Decode images, and give each batch back as soon as it is full."""
    num_done: dict[int, int] = {}
    with contextlib.closing(pool.feed(paths, work)) as feed:
        for outcomes in feed.outcomes():
            for outcome in outcomes:
                if not isinstance(outcome.found, tuple) or isinstance(outcome.found[0], str):
                    raise RuntimeError(f"a photograph failed: {outcome.found}")
                for slot in outcome.slots:
                    batch = slot // pool.batch_size
                    num_done[batch] = num_done.get(batch, 0) + 1
                    if num_done[batch] == pool.batch_size:
                        del num_done[batch]
                        feed.hand_over(batch)
                        pool.release(batch)


# End to end. -------------------------------------------------------------------------------------


def end_to_end(section: Section) -> None:
    """From JPEG files to a store."""
    settings = section.settings
    for shard_size in settings["shard_sizes"]:
        for network in settings["end_to_end"]:
            what = {"precision": settings["end_to_end_precision"], "shard_size": shard_size}
            section.measure(folder_speed, network=network, **what)


def folder_speed(
    section: Section, network: str, precision: str, shard_size: int | None
) -> dict[str, Any]:
    """A short run to warm up, one to see the memory, and measured ones."""
    settings = section.settings
    scratch, photos = Path(settings["scratch"]), Path(settings["many_photos"])
    options = {
        "backbone": network,
        "weights": None if network == "efficientnet-lite0" else "random:0",
        "precision": precision,
        "image_size": settings["image_size"],
        "engine": settings["engine"],
        "batch_size": settings["best_batch_sizes"].get(network, settings["batch_sizes"][0]),
        "shard_size": shard_size,
        "limit": settings["memory_rows"],
    }
    device = run_of(photos, scratch, options)["engine"].rpartition(" on ")[2]
    if settings["card"] and device == "CPU":
        raise NotMeasuredError(f"{settings['engine']} does not use the card")
    with Monitor(with_host_memory=True) as monitor:
        speed = run_of(photos, scratch, options)["images_per_second"]
    options["limit"] = affordable_rows(section, speed)
    rounds = [round_of(photos, scratch, options) for _ in range(settings["rounds"])]
    kept = ("busy", "engine", "batch_size", "decoders", "bottleneck")
    return {
        "device": device,
        "rows": options["limit"],
        **spread_of([one["images_per_second"] for one in rounds]),
        **{name: rounds[-1][name] for name in kept},
        **monitor.peaks,
        "rounds": rounds,
    }


def round_of(photos: Path, scratch: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The record of a run, without what is not of its speed, and how busy the card was."""
    with Monitor() as monitor:
        record = run_of(photos, scratch, options)
    left_out = ("source", "versions", "options", "failures", "skipped_files")
    kept = {name: value for name, value in record.items() if name not in left_out}
    return kept | {"busy": monitor.busy_share(record["begin"], record["end"])}


def run_of(photos: Path, scratch: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The record of a run into a new store, and when images went through it."""
    store = scratch / "store"
    shutil.rmtree(store, ignore_errors=True)
    given = {name: value for name, value in options.items() if value is not None}
    record = embedder.extract(photos, store, quiet=True, **given).runs()[-1]
    end = time.time()
    seconds = record["counts"]["embedded"] / record["images_per_second"]
    return record | {"begin": end - seconds, "end": end}


# Cores. ------------------------------------------------------------------------------------------


def cores(section: Section) -> None:
    """The CPU engine and the decoders on some of the cores, each number in a process of its own."""
    for count in section.settings["decoders"]:
        section.measure(speeds_on, cores=count)


def speeds_on(section: Section, cores: int) -> dict[str, Any]:
    allowed = sorted(os.sched_getaffinity(0))
    if cores > len(allowed):
        raise NotMeasuredError(f"there are {len(allowed)} cores")
    settings = section.settings | {"affinity": allowed[:cores]}
    found = run_section("gpu_ours.py", "some_cores", settings, 60.0)
    row = {name: value for one in found["rows"] for name, value in one.items()}
    return row | {name: found[name] for name in ("reason",) if name in found}


def some_cores(section: Section) -> None:
    settings = section.settings
    os.sched_setaffinity(0, settings["affinity"])
    count = num_cores()
    found = decoding_speed(settings, count)
    section.tell(**{f"decoding {name}": value for name, value in found.items()})
    if not is_installed("openvino"):
        section.tell(openvino="not measured: no openvino")
        return
    for precision in ("float32", "bfloat16"):
        try:
            recipe = recipe_of(settings["light_network"], precision, section)
            engine = load_engine("openvino", recipe, 4, section, count)
            batches = random_batches(engine.batch_size, recipe.image_size)
            speed = speed_of(engine, batches, settings["seconds"] / 2)
            section.tell(**{f"openvino {precision}": speed})
        except Exception as error:  # noqa: BLE001 - told, and does not end the others
            section.tell(**{f"openvino {precision}": f"not measured: {error}"})


if __name__ == "__main__":
    serve([vectors, repeated, inference, decoding, end_to_end, cores, some_cores])
