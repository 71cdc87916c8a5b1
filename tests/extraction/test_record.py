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
        "engine": "openvino on CPU",
        "num_decoders": 2,
        "num_parallel": 2,
        "decode_cpu_seconds": 4.0,
        "num_bytes": 5_000_000,
        "num_bytes_read": 50_000_000,
    }
    facts |= receipt
    facts.setdefault("engines_seconds", facts.get("seconds", {}).get("embed", 0.0))  # type: ignore
    return Receipt("s.parquet", **facts)  # type: ignore[arg-type]


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
        "waits": {"read": 1.0, "room": 2.0},
        "python_seconds": 0.5,
        "failures": Counter({("decode", "x"): 2, ("decode", "y"): 1, ("read", "z"): 1}),
    }
    small = {"num_embedded": 10, "num_bytes": 1, "num_bytes_read": 2}
    summary = summary_of(mean_colour_recipe, **facts)  # from 100 to 110
    summary.add(receipt_of(first_read=started, last_written=ended, **small, **facts))
    record = summary.record()
    assert summary.images_per_second == pytest.approx(1010 / elapsed)
    assert (summary.num_bytes, summary.num_bytes_read) == (5_000_001, 50_000_002)
    assert (record["counts"]["embedded"], record["counts"]["failed"]) == (1010, 8)
    assert record["failures"] == {"decode": 6, "read": 2}
    assert record["seconds"] == seconds(2, 4, 6, 8)
    assert record["waits"] == {"read": 2.0, "room": 4.0}
    assert record["python_seconds"] == 1.0
    assert record["decode_cpu_seconds"] == 8.0


def test_time_without_a_shard_is_between_those_of_one_worker(mean_colour_recipe: Recipe) -> None:
    spans = [("a", 1.0, 4.0), ("b", 2.0, 3.0), ("a", 2.0, 3.0), ("a", 6.0, 7.0), ("b", 3.5, 9.0)]
    summary = summary_of(mean_colour_recipe, spans=spans)
    assert summary.seconds_without_shard == pytest.approx(2.0 + 0.5)


def test_a_run_with_nothing_to_do_has_no_bottleneck(mean_colour_recipe: Recipe) -> None:
    summary = summary_of_nothing(mean_colour_recipe)
    assert summary.bottleneck == "nothing to embed"
    assert summary.record()["images_per_second"] == 0.0
    assert summary.record()["engine_idle"] is None
