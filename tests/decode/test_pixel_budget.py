"""Who may have pixels in work, and who waits."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from embedder.decode.pixel_budget import PixelBudget


def is_let_in(budget: PixelBudget, future: Future[Any]) -> bool:
    """Whether a thread gets on, or comes to wait for its turn: one of the two must happen."""
    for _ in range(6000):
        if future.done() or budget.turn.locked():
            return future.done()
        wait([future], timeout=0.01)  # seconds
    raise AssertionError("It neither got on nor waited for its turn")


def take(budget: PixelBudget, num_pixels: int) -> None:
    with budget.taken(num_pixels):
        pass


def test_large_pictures_wait_until_enough_of_the_budget_is_free() -> None:
    budget = PixelBudget(100, num_ordinary=10)
    with ThreadPoolExecutor(1) as threads:
        with budget.taken(60):
            with budget.taken(40):
                threads.submit(take, budget, 10).result(timeout=60)  # not large
            threads.submit(take, budget, 40).result(timeout=60)
            waiting = threads.submit(take, budget, 41)
            assert not is_let_in(budget, waiting)
        waiting.result(timeout=60)
    assert budget.num_free == 100


def test_a_picture_above_the_whole_budget_is_let_in_alone() -> None:
    budget = PixelBudget(100, num_ordinary=10)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(take, budget, 1000).result(timeout=60)
        with budget.taken(11):
            waiting = threads.submit(take, budget, 1000)
            assert not is_let_in(budget, waiting)
        waiting.result(timeout=60)
    assert budget.num_free == 100


def test_a_large_picture_that_waits_is_not_overtaken_but_by_ordinary_ones() -> None:
    budget = PixelBudget(100, num_ordinary=10)
    order: list[str] = []

    def note(num_pixels: int, name: str) -> None:
        with budget.taken(num_pixels):
            order.append(name)

    with ThreadPoolExecutor(2) as threads:
        with budget.taken(60):
            first = threads.submit(note, 100, "first")
            assert not is_let_in(budget, first)
            second = threads.submit(note, 20, "second")
            note(10, "ordinary")
            with pytest.raises(TimeoutError):  # it would be let in at once
                second.result(timeout=0.2)
    assert order == ["ordinary", "first", "second"]
