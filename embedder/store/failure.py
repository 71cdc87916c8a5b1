"""Why an image has no row; apart, so that decoders need not load what stores need."""

from typing import NamedTuple


class Failure(NamedTuple):
    """Why an image has no row."""

    stage: str
    error: str
    is_passing: bool = False
