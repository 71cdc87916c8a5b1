"""What a run's shards add up to, and the sentence that names its bottleneck, with its figures."""

from collections import Counter

import pytest

from embedder.extraction.record import Receipt, Summary
from embedder.recipe import Recipe


def summary_of_nothing(recipe: Recipe) -> Summary:
    return Summary(
        "photos", "store", {}, recipe, started=0.0, num_inputs=1000, num_repeated=0, skipped={}
    )


def summary_of(recipe: Recipe, **receipt: object) -> Summary:
    """A run of ten seconds and one worker, with 1,000 images in one shard."""
    summary = summary_of_nothing(recipe)
    summary.add(receipt_of(**receipt))
    return summary


def receipt_of(**receipt: object) -> Receipt:
    facts = {
        "first_read": 100.0,
        "last_written": 110.0,
        "num_embedded": 1000,
        "num_ready": 900,
        "engine": "openvino on CPU",
        "num_threads": 2,
        "num_parallel": 2,
        "decode_cpu_seconds": 4.0,
        "num_bytes": 5_000_000,
        "num_bytes_read": 50_000_000,
    }
    return Receipt("s.parquet", **(facts | receipt))  # type: ignore[arg-type]


def seconds(read: float, decode: float, embed: float, write: float) -> dict[str, float]:
    return {"read": read, "decode": decode, "embed": embed, "write": write}


@pytest.mark.parametrize(
    ("started", "ended", "elapsed"), [(102.0, 105.0, 10.0), (90.0, 120.0, 30.0)]
)
def test_shards_add_up(
    mean_colour_recipe: Recipe, started: float, ended: float, elapsed: float
) -> None:
    facts = {
        "seconds": seconds(1, 2, 3, 4),
        "waits": {"decode": 1.0, "embed": 2.0},
        "failures": Counter({("decode", "x"): 2, ("decode", "y"): 1, ("read", "z"): 1}),
    }
    small = {"num_embedded": 10, "num_ready": 5, "num_bytes": 1, "num_bytes_read": 2}
    summary = summary_of(mean_colour_recipe, **facts)  # from 100 to 110
    summary.add(receipt_of(first_read=started, last_written=ended, **small, **facts))
    record = summary.record()
    assert summary.images_per_second == pytest.approx(1010 / elapsed)
    assert (summary.num_bytes, summary.num_bytes_read) == (5_000_001, 50_000_002)
    assert (record["counts"]["embedded"], record["counts"]["failed"]) == (1010, 8)
    assert record["failures"] == {"decode": 6, "read": 2}
    assert record["seconds"] == seconds(2, 4, 6, 8)
    assert record["waits"] == {"decode": 2.0, "embed": 4.0}
    assert record["decode_cpu_seconds"] == 8.0
    assert record["ready"] == 905


def test_an_engine_that_never_waits_is_the_bottleneck(mean_colour_recipe: Recipe) -> None:
    summary = summary_of(
        mean_colour_recipe, seconds=seconds(1, 5, 19, 0.2), waits={"decode": 0.5, "embed": 8.0}
    )
    assert summary.bottleneck == (
        "embed-bound: openvino on CPU was busy, 90% of the images were decoded when wanted, and "
        "decoding took 20% of the 2 cores. A GPU, more cores, or on a CPU that has it "
        "`--precision bfloat16` would help"
    )
    assert summary.engine_idle == pytest.approx(0.05)


def test_on_a_gpu_neither_cores_nor_bfloat16_would_help(mean_colour_recipe: Recipe) -> None:
    summary = summary_of(
        mean_colour_recipe,
        engine="tensorflow on GPU",
        seconds=seconds(1, 5, 21, 0.2),
        waits={"decode": 0.5, "embed": 8.0},
    )
    assert summary.bottleneck == (
        "embed-bound: tensorflow on GPU was busy, 90% of the images were decoded when wanted. "
        "More GPUs would help"
    )
    assert summary.engine_idle == 0.0  # more than busy, by how its seconds are measured


def test_bfloat16_is_not_advised_to_who_has_it(mean_colour_recipe: Recipe) -> None:
    recipe = mean_colour_recipe.model_copy(update={"precision": "bfloat16"})
    summary = summary_of(
        recipe, seconds=seconds(1, 5, 19, 0.2), waits={"decode": 0.5, "embed": 8.0}
    )
    assert summary.bottleneck.endswith("More cores, workers or GPUs would help")


@pytest.mark.parametrize(
    ("decode", "advice"), [("exact", "--decode scaled"), ("scaled", "More cores or workers")]
)
def test_decoding_that_the_engine_waits_for(
    mean_colour_recipe: Recipe, decode: str, advice: str
) -> None:
    summary = summary_of(
        mean_colour_recipe.model_copy(update={"decode": decode}),
        seconds=seconds(1, 18, 12, 0.2),
        waits={"decode": 8.0, "embed": 0.5},
    )
    assert summary.bottleneck.startswith(
        "decode-bound: 2 cores decode 500 images/s; the engine idled 40% of the time. "
    )
    assert advice in summary.bottleneck


def test_reading_that_the_engine_waits_for(mean_colour_recipe: Recipe) -> None:
    summary = summary_of(
        mean_colour_recipe, seconds=seconds(15, 4, 2, 0.2), waits={"decode": 9.0, "embed": 0.1}
    )
    assert summary.bottleneck.startswith("read-bound: 2 threads read 5.0 MB/s; the engine idled 90")


def test_writing_that_takes_most_of_the_run(mean_colour_recipe: Recipe) -> None:
    summary = summary_of(
        mean_colour_recipe, seconds=seconds(1, 4, 2, 8), waits={"decode": 1.0, "embed": 0.1}
    )
    assert summary.bottleneck.startswith("write-bound: shards are written at 0.6 MB/s")
    summary.num_workers = 2  # of twenty seconds, not of ten
    assert summary.bottleneck.startswith("decode-bound")


def test_two_workers_are_twice_as_large(mean_colour_recipe: Recipe) -> None:
    summary = summary_of(
        mean_colour_recipe,
        seconds=seconds(1, 18, 20, 0.2),
        waits={"decode": 8.0, "embed": 0.5},
        num_embedded=800,
        failures=Counter({("decode", "x"): 200}),  # took their time too
    )
    summary.num_workers = 2
    assert summary.bottleneck.startswith(
        "decode-bound: 4 cores decode 1,000 images/s; the engine idled 50% of the time. "
    )


def test_a_run_with_nothing_to_do_has_no_bottleneck(mean_colour_recipe: Recipe) -> None:
    summary = summary_of_nothing(mean_colour_recipe)
    assert summary.bottleneck == "nothing to embed"
    assert summary.record()["images_per_second"] == 0.0
    assert summary.record()["engine_idle"] is None
