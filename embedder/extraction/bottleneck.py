"""What held a run back, by what was measured: the stage, the figures that say so, what would help.

Decoders are asked, since all that is slow shows there: they read, they decode, they wait for room
where the network has all it can take, or they have no images, which is then the fault of writing,
of Dask, or of Python.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedder.extraction.record import Summary

_ENGINE_BUSY = 0.1  # share of the run that an engine idles; below it, nothing else matters
_ENGINE_IDLE = 0.5  # share of the run; above it, no network holds it back
_SHARE = 0.3  # of the run, that what decoders without images wait for must take
_FEW_SHARDS = 2  # of a worker, of which the start and the end weigh more than what is between
_QUEUE = 3.0  # times the quickest read that the mean one takes, where reads wait for each other


def bottleneck_of(run: "Summary") -> str:
    """A line on what held a run back.

    Args:
        run: With at least one image embedded.
    """
    stage = _slowest_stage(run)
    facts, advice = {
        "embed": _embed,
        "decode": _decode,
        "read": _read,
        "write": _write,
        "dask": _dask,
        "python": _python,
    }[stage](run)
    return f"{stage}-bound: {facts}. {advice}"


def _slowest_stage(run: "Summary") -> str:
    num_workers, elapsed = run.num_workers, run.elapsed
    # Decoders of a short run may fill all batches and end before they have to wait.
    if run.engine_idle < _ENGINE_BUSY:
        return "embed"
    of_decoders = {
        "embed": run.waits["room"],
        "decode": run.seconds["decode"],
        "read": run.waits["read"],
    }
    stage = max(of_decoders, key=lambda stage: of_decoders[stage])
    idle = num_workers * run.num_decoders * elapsed - sum(of_decoders.values())
    is_engine_idle = stage == "embed" and run.engine_idle > _ENGINE_IDLE  # and yet it takes no more
    if is_engine_idle or idle > of_decoders[stage]:
        of_workers = {
            "write": run.seconds["write"],
            "python": run.python_seconds,
            "dask": _seconds_of_dask(run),
        }
        worst = max(of_workers, key=lambda stage: of_workers[stage])
        if of_workers[worst] > _SHARE * num_workers * elapsed:
            return worst
    return stage


def _seconds_of_dask(run: "Summary") -> float:
    """Seconds of workers that went into handing out shards, beginning and ending them."""
    if len(run.spans) <= _FEW_SHARDS * run.num_workers:
        return 0.0
    of_decoders = run.waits["room"] + run.seconds["decode"] + run.waits["read"]
    known = of_decoders / run.num_decoders + run.seconds["write"] + run.python_seconds
    return max(run.seconds_without_shard, run.num_workers * run.elapsed - known)


def _embed(run: "Summary") -> tuple[str, str]:
    decoders = run.num_workers * run.num_decoders
    share = run.waits["room"] / (decoders * run.elapsed)
    facts = (
        f"{run.engine} was busy {1 - run.engine_idle:.0%} of the time, and {_decoders(run)} waited "
        f"for it {share:.0%} of the time"
    )
    if "CPU" not in run.engine:
        return facts, "More GPUs would help"
    if run.recipe.precision == "float32":
        return facts, "A GPU, more cores, or on a CPU that has it `--precision bfloat16` would help"
    return facts, "More cores, workers or GPUs would help"


def _decode(run: "Summary") -> tuple[str, str]:
    decoders = run.num_workers * run.num_decoders
    rate = run.num_images * decoders / max(run.seconds["decode"], 1e-9)
    verb = "decode" if decoders > 1 else "decodes"
    facts = f"{_decoders(run)} {verb} {rate:,.0f} images/s beside the network; {_idle(run)}"
    if run.recipe.decode == "exact":
        return facts, "More cores or workers, or `--decode scaled` for large photos, would help"
    return facts, "More cores or workers would help"


def _read(run: "Summary") -> tuple[str, str]:
    mean = run.seconds["read"] / run.num_images
    at_once = run.seconds["read"] / run.elapsed
    rate = run.num_bytes_read / run.elapsed / 1e6
    facts = (
        f"an image takes {1000 * mean:,.1f} ms to read, {at_once:,.1f} are read at once, at "
        f"{rate:,.1f} MB/s; {_idle(run)}"
    )
    if mean < _QUEUE * run.fastest_read:  # they do not wait for each other, only for the answer
        return facts, "More reads at once would help: a larger `--read-ahead`, or more workers"
    return facts, "A faster disk or network would help"


def _write(run: "Summary") -> tuple[str, str]:
    rate = run.num_bytes / max(run.seconds["write"], 1e-9) / 1e6
    facts = f"shards are written at {rate:,.1f} MB/s; {_idle(run)}"
    return facts, "A faster disk, or `--store-dtype float16`, would help"


def _dask(run: "Summary") -> tuple[str, str]:
    share = _seconds_of_dask(run) / (run.num_workers * run.elapsed)
    facts = (
        f"workers had no images in hand {share:.0%} of the time, between {len(run.spans):,} "
        f"shards; {_idle(run)}"
    )
    return facts, "Larger shards, or a scheduler with less to do, would help"


def _python(run: "Summary") -> tuple[str, str]:
    share = min(1.0, run.python_seconds / (run.num_workers * run.elapsed))
    facts = (
        f"images waited for Python in the engine's process {share:.0%} of the time; {_idle(run)}"
    )
    return facts, "More workers would help"


def _decoders(run: "Summary") -> str:
    decoders = run.num_workers * run.num_decoders
    return f"{decoders:,} decoder{'s' if decoders > 1 else ''}"


def _idle(run: "Summary") -> str:
    return f"the engine idled {run.engine_idle:.0%} of the time"
