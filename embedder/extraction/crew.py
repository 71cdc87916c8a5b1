"""The workers that can do a run's work: how many there are, and what a task takes of one."""

import time
from typing import Any

import distributed

from embedder.errors import Unfinished
from embedder.extraction.worker_gpus import RESOURCE, gpu_of_this_worker, tell_of_gpus
from embedder.libraries import logger

TASKS_PER_WORKER = 2  # one task's start and end overlap with the other's middle
LOOK_SECONDS = 1  # after which a scheduler is asked again
ANSWER_SECONDS = 10  # for a scheduler to answer
_GONE_SECONDS = 60  # for a worker to come back, once all are gone


class NobodyLeft(Unfinished):
    """There are no workers, or there is no scheduler, to do the work."""


class Crew:
    """The workers that can do a run's work; those of a scheduler may come and go.

    Attributes:
        num_workers: Worker processes, at least 1. Of a scheduler as many as it told of last; of
            this run's own all, since one that dies is started again.
        share: What a task takes of what its worker declares to have: of its GPU, once a worker of
            a scheduler declares to have one.
    """

    def __init__(
        self,
        client: distributed.Client,
        name: str,
        num_own: int | None = None,
        *,
        in_process: bool = False,
        with_gpus: bool = False,
    ) -> None:
        """Know the workers of a client.

        Args:
            client: Connected.
            name: Of the scheduler, for messages.
            num_own: Workers, where they are this run's own; None where they are a scheduler's.
            in_process: Whether the only worker is this process.
            with_gpus: Whether workers of a scheduler are asked for GPUs.
        """
        self.num_workers = num_own or 1
        self.share: dict[str, float] = {}
        self._client, self._name = client, name
        self._is_own, self._in_process, self._with_gpus = bool(num_own), in_process, with_gpus
        self._seen: set[str] = set()  # workers that were asked for their GPUs
        self._gpu_of: dict[str, tuple[str, str] | None] = {}  # of those that answered
        self._gone: float | None = None  # since when, by the monotonic clock, as all below
        self._asked = float("-inf")
        self.begin()

    def begin(self) -> None:
        """Start to count for `mean_workers`."""
        self._begun = self._counted = time.monotonic()
        self._worker_seconds = 0.0

    @property
    def mean_workers(self) -> int:
        """Worker processes on average since `begin`, rounded."""
        self._count()
        seconds = self._counted - self._begun
        return max(1, round(self._worker_seconds / seconds)) if seconds else self.num_workers

    def _count(self) -> None:
        now = time.monotonic()
        self._worker_seconds += self.num_workers * (now - self._counted)
        self._counted = now

    def look_again(self) -> None:
        """Do as `look` does if the workers are a scheduler's, and it was not asked just now."""
        if not self._is_own and time.monotonic() - self._asked >= LOOK_SECONDS:
            self.look()

    def look(self) -> None:
        """Ask the scheduler which workers it has.

        Raises:
            NobodyLeft: There is no scheduler, or there have been no workers for too long.
        """
        if self._in_process:
            return  # it cannot go, and a decoder that keeps Python to itself may let none answer
        if self._client.status != "running":
            raise self.lost()
        trouble = ""
        try:
            if not self._take_note_of_workers():
                which = f"workers with a {RESOURCE}" if self.share else "workers"
                trouble = f"All {which} of {self._name} are gone"
        except OSError:  # a time-out is one too
            trouble = f"There is no answer from {self._name}"
        self._asked = time.monotonic()
        if not trouble:
            self.has_workers()
        elif self._gone is None:
            self._gone = time.monotonic()
            logger.warning(
                "%s, at %s; waiting up to %d s for one to come back",
                *(trouble, time.strftime("%H:%M:%S"), _GONE_SECONDS),
            )
        elif time.monotonic() - self._gone > _GONE_SECONDS:
            raise NobodyLeft(
                f"{trouble}, and none came back within {_GONE_SECONDS} seconds. What is written "
                f"is kept; run the same command again"
            )

    def has_workers(self) -> None:
        """Note that there are some."""
        if self._gone is not None:
            self._gone = None
            logger.info("Work goes on, at %s", time.strftime("%H:%M:%S"))

    def lost(self) -> NobodyLeft:
        """What to raise when there is no scheduler any more."""
        return NobodyLeft(
            f"The connection to {self._name} was lost. What is written is kept; run the same "
            f"command again"
        )

    def _take_note_of_workers(self) -> bool:
        """Whether there are workers that can do the work, of which note is taken."""
        found = self._client.sync(
            self._client.scheduler.identity,
            # Without their descriptions, of which there may be many, where any worker will do.
            n_workers=-1 if self._with_gpus else 0,
            callback_timeout=ANSWER_SECONDS,
        )
        able = self._able(found["workers"]) if self._with_gpus else []
        num_able = len(able) if self._with_gpus else found["n_workers"]
        if not self._is_own:
            self._count()
            self.num_workers = max(1, num_able)
        if new := set(able) - self._seen:
            self._see_gpus(new, able)
        return bool(num_able)

    def _able(self, workers: dict[str, Any]) -> list[str]:
        """Workers that can do the work: those with a GPU, from when one declares to have it."""
        share = {RESOURCE: 1 / TASKS_PER_WORKER}
        with_gpu = [
            address
            for address, worker in workers.items()
            if worker["resources"].get(RESOURCE, 0) >= share[RESOURCE]
        ]
        if with_gpu and not self.share:
            self.share = share
            logger.info(
                "%d of %d workers declare the resource %s; from now on only such get work",
                *(len(with_gpu), len(workers), RESOURCE),
            )
        return with_gpu if self.share else list(workers)

    def _see_gpus(self, new: set[str], able: list[str]) -> None:
        """Tell of new workers that share a GPU, or lack the one that they declare."""
        self._seen |= new
        self._gpu_of |= self._client.run(
            gpu_of_this_worker,
            workers=list(new),
            on_error="ignore",
            callback_timeout=ANSWER_SECONDS,
        )
        found = {worker: gpu for worker, gpu in self._gpu_of.items() if worker in able}
        tell_of_gpus(found, new, self._client.scheduler.address, expected=bool(self.share))
