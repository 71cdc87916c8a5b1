"""The sentence that names a run's bottleneck: from where the shards waited, with its figures."""

import pytest

from embedder.pipeline import Receipt
from embedder.recipe import Recipe
from embedder.summary import Summary


def summary_of_nothing(recipe: Recipe) -> Summary:
    return Summary(
        "photos", "store", {}, recipe, started=0.0, num_inputs=1000, num_repeated=0, skipped={}
    )


def summary_of(recipe: Recipe, **receipt: object) -> Summary:
    """A run of ten seconds and one worker, with 1,000 images in one shard."""
    summary = summary_of_nothing(recipe)
    facts = {
        "started": 100.0,
        "ended": 110.0,
        "num_rows": 1000,
        "num_ready": 900,
        "engine": "openvino on CPU",
        "num_threads": 2,
        "num_parallel": 2,
        "decode_cpu_seconds": 4.0,
        "num_bytes": 5_000_000,
        "num_bytes_read": 50_000_000,
    }
    summary.add(Receipt("s.parquet", **(facts | receipt)))  # type: ignore[arg-type]
    return summary


def seconds(read: float, decode: float, embed: float, write: float) -> dict[str, float]:
    return {"read": read, "decode": decode, "embed": embed, "write": write}


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


def test_the_engine_of_two_workers_is_twice_as_large(mean_colour_recipe: Recipe) -> None:
    summary = summary_of(
        mean_colour_recipe, seconds=seconds(1, 18, 20, 0.2), waits={"decode": 8.0, "embed": 0.5}
    )
    summary.num_workers = 2
    assert summary.engine_idle == pytest.approx(0.5)


def test_a_run_with_nothing_to_do_has_no_bottleneck(mean_colour_recipe: Recipe) -> None:
    summary = summary_of_nothing(mean_colour_recipe)
    assert summary.bottleneck == "nothing to embed"
    assert summary.record()["images_per_second"] == 0.0
