"""Whose bytes fit, and who waits."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest

from embedder.sources.byte_budget import ByteBudget, Claim


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def holding(budget: ByteBudget, num_bytes: int) -> Claim:
    claim = budget.claim()
    claim.need(num_bytes)
    return claim


def let_in(future: "Future[None]") -> None:
    future.result(timeout=60)


def waits(budget: ByteBudget, claim: Claim, future: "Future[None]") -> bool:
    """Whether a claim comes to wait, or gets on: one of the two must happen."""
    for _ in range(6000):
        if future.done() or claim in budget.waiting:
            return not future.done()
        wait([future], timeout=0.01)  # seconds
    raise AssertionError("It neither got on nor waited")


def test_files_wait_until_their_bytes_fit(threads: ThreadPoolExecutor) -> None:
    budget = ByteBudget(100)
    first, second = holding(budget, 60), holding(budget, 40)
    third = budget.claim()
    waiting = threads.submit(third.need, 41)
    assert waits(budget, third, waiting)
    second.release()
    assert waits(budget, third, waiting)
    first.release()
    let_in(waiting)
    assert budget.num_held == 41
    third.release()
    assert budget.num_held == 0


def test_a_file_above_the_whole_budget_is_let_in_alone(threads: ThreadPoolExecutor) -> None:
    budget = ByteBudget(100)
    small, large = holding(budget, 1), budget.claim()
    waiting = threads.submit(large.need, 1000)
    assert waits(budget, large, waiting)
    small.release()
    let_in(waiting)


def test_a_small_file_does_not_overtake_a_large_one(threads: ThreadPoolExecutor) -> None:
    budget = ByteBudget(100)
    first, large, small = holding(budget, 60), budget.claim(), budget.claim()
    for_large = threads.submit(large.need, 50)
    assert waits(budget, large, for_large)
    for_small = threads.submit(small.need, 10)
    assert waits(budget, small, for_small)
    first.release()
    let_in(for_large)
    let_in(for_small)


def test_a_file_that_turns_out_larger_goes_before_those_that_have_nothing(
    threads: ThreadPoolExecutor,
) -> None:
    budget = ByteBudget(100)
    growing, other, new = holding(budget, 50), holding(budget, 50), budget.claim()
    for_new = threads.submit(new.need, 10)
    assert waits(budget, new, for_new)
    more = threads.submit(growing.need, 100)
    assert waits(budget, growing, more)
    other.release()
    let_in(more)
    assert waits(budget, new, for_new)
    growing.release()
    let_in(for_new)


def test_files_that_all_turn_out_larger_do_not_wait_for_each_other_for_ever(
    threads: ThreadPoolExecutor,
) -> None:
    budget = ByteBudget(100)
    claims = [holding(budget, 50), holding(budget, 50)]
    more = [threads.submit(claim.need, 80) for claim in claims]
    done, _ = wait(more, timeout=60, return_when="FIRST_COMPLETED")
    first = more.index(done.pop())
    assert waits(budget, claims[1 - first], more[1 - first])  # one at a time
    claims[first].release()
    let_in(more[1 - first])


def test_what_is_released_waits_no_longer_and_holds_nothing(threads: ThreadPoolExecutor) -> None:
    budget = ByteBudget(100)
    first, given_up = holding(budget, 60), budget.claim()
    waiting = threads.submit(given_up.need, 60)
    assert waits(budget, given_up, waiting)
    given_up.release()
    let_in(waiting)
    given_up.need(1000)
    assert budget.num_held == 60
    first.release()


def test_fewer_bytes_than_are_held_give_nothing_back() -> None:
    budget = ByteBudget(100)
    claim = holding(budget, 60)
    claim.need(10)
    assert budget.num_held == 60
