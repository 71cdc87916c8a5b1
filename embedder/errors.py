"""Errors a caller may want to catch.

EmbedderError
├── RequestError       the request makes no sense; nothing was started
│   └── RecipeError    the recipe makes no sense
├── SourceError        the source is missing, empty or unreadable
├── WeightsError       the weights are missing, corrupt or not of this backbone
├── EngineError        the engine cannot run here
│   └── OutOfMemory    a batch is too large for the device; a smaller one is tried
├── ClusterError       the scheduler does not answer, or has no workers
├── StoreError         the store cannot be read or written
│   ├── RecipeMismatch the store was made with another recipe
│   ├── DamagedShard   a shard's bytes are not those that were written
│   └── StoreBusy      another run is writing the store
├── ModelError         the model cannot be read or written, or its files are not to be trusted
├── JobError           the job file cannot be read, or is no job
├── ImageError         something is wrong with one image; recorded as a failure, never fatal
│   ├── ReadError      its bytes cannot be had
│   └── DecodeError    its bytes are unusable
└── Unfinished         the job ran, but did not finish what it was asked

`exit_status` is what the command line ends with: 2, the request makes no sense and nothing was
started; 1, the job ran but did not finish.
"""

from collections.abc import Iterable
from typing import Any, Self

# How a rule of pydantic's reads, by the type of its error.
_RULES = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
    "literal_error": "{expected}",
    "missing": "given",
}


class EmbedderError(Exception):
    """Base of every error this package raises on purpose."""

    exit_status = 2


class RequestError(EmbedderError):
    """The request makes no sense; nothing was started."""

    @classmethod
    def of(cls, problems: list[Any], known: Iterable[str]) -> Self:
        """Say of each value that pydantic refused the rule, and what was received.

        Args:
            problems: As pydantic's `ValidationError.errors` has them.
            known: Names of the options there are.
        """
        return cls(" ".join(_explain(problem, known) for problem in problems))


class RecipeError(RequestError):
    """The recipe makes no sense; nothing was started."""


def _explain(problem: dict[str, Any], known: Iterable[str]) -> str:
    kind, message = problem["type"], problem["msg"]
    if not problem["loc"]:
        return str(message.removeprefix("Value error, "))
    name = problem["loc"][0]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"Unknown option: {name}. There are: {', '.join(known)}."
    received = "nothing" if kind == "missing" else f"{name}={problem['input']!r}"
    if kind not in _RULES:
        return f"`{name}`: {message}. Received: {received}"
    rule = _RULES[kind].format(**problem.get("ctx", {})).replace("'", "")
    return f"`{name}` must be {rule}. Received: {received}"


class SourceError(EmbedderError):
    """The source is missing, empty or unreadable; nothing was started."""


class WeightsError(EmbedderError):
    """The weights are missing, corrupt, or not of this backbone."""


class EngineError(EmbedderError):
    """The engine cannot run on this machine."""


class OutOfMemory(EngineError):  # noqa: N818 - says what it is
    """A batch does not fit into the device's memory; a smaller one may."""


class ClusterError(EmbedderError):
    """The Dask scheduler does not answer, or has no workers."""


class StoreError(EmbedderError):
    """The store cannot be read or written."""


class RecipeMismatch(StoreError):  # noqa: N818 - says what it is
    """The store was made with another recipe."""


class DamagedShard(StoreError):  # noqa: N818 - says what it is
    """A shard's bytes are not those that were written."""


class StoreBusy(StoreError):  # noqa: N818 - says what it is
    """Another run is writing the store; this one has done nothing."""

    exit_status = 1


class ModelError(EmbedderError):
    """The model cannot be read or written, or its files are not to be trusted."""


class JobError(EmbedderError):
    """The job file cannot be read, or is no job; nothing was started."""


class ImageError(EmbedderError):
    """Base of what can be wrong with one image; recorded as a failure, never fatal.

    Attributes:
        is_passing: Whether it may be over by the next run, which then tries the image again.
    """

    def __init__(self, message: str, *, is_passing: bool = False) -> None:
        """Say what is wrong, and whether that may pass."""
        super().__init__(message)
        self.is_passing = is_passing


class ReadError(ImageError):
    """The bytes of one image cannot be had; recorded as a failure, never fatal."""


class DecodeError(ImageError):
    """The bytes of one image are unusable; recorded as a failure, never fatal."""


class Unfinished(EmbedderError):  # noqa: N818 - not a fault of the program
    """The job ran, but did not finish what it was asked; what is done is kept."""

    exit_status = 1
