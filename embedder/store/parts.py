"""Parts: the shares of a source that runs on unrelated machines take to fill one store together."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from embedder.errors import RequestError

_PART = re.compile(r"0*([1-9][0-9]{0,5})/0*([1-9][0-9]{0,5})")


@dataclass(frozen=True, order=True)
class Part:
    """One of so many shares of all images that there can be.

    Which share an image is in depends on its id and on the number of parts alone: it is the same
    on every machine, and whatever else the source holds. See `part_numbers`.

    Attributes:
        count: Number of parts, from 1.
        number: Which of them, 1 to `count`.
    """

    count: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `I/N`.

        Raises:
            RequestError: It is none.
        """
        found = _PART.fullmatch(text)
        if found is None or int(found[1]) > int(found[2]):
            raise RequestError(
                f"`part` must be I/N, with I from 1 to N and N up to 999999, such as 3/16. "
                f"Received: part={text!r}"
            )
        return cls(count=int(found[2]), number=int(found[1]))

    @classmethod
    def of_run(cls, record: Mapping[str, Any]) -> Self | None:
        """The part that a run had, by its record; None if it had the whole source."""
        options = record.get("options")
        text = options.get("part") if isinstance(options, dict) else None
        try:
            return cls.parse(text) if isinstance(text, str) else None
        except RequestError:  # changed by hand
            return None

    def __str__(self) -> str:
        """As it is given: `3/16`."""
        return f"{self.number}/{self.count}"

    def share_of(self, table: pa.Table) -> pa.Table:
        """Rows of a table, by its `image_id`, that are in this part, in their order."""
        return table.filter(pa.array(part_numbers(table["image_id"], self.count) == self.number))


def share_of(table: pa.Table, part: Part | None) -> pa.Table:
    """Rows of a table that are in a part; all, where there is none."""
    return table if part is None else part.share_of(table)


def part_numbers(ids: pa.ChunkedArray, num_parts: int) -> NDArray[np.int64]:
    """The part that each image is in.

    It is `1 + XXH3_64(id) % num_parts`, of the id's UTF-8 bytes with seed 0. A million ids take a
    fraction of a second.

    Args:
        ids: Texts without nulls.
        num_parts: At least 1.

    Returns:
        Array of shape (n_ids,), values 1 to `num_parts`.
    """
    encoded = (text for chunk in ids.cast(pa.binary()).chunks for text in chunk.to_pylist())
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(ids))
    return (hashes % np.uint64(num_parts)).astype(np.int64) + 1


def last_division(runs: Iterable[Mapping[str, Any]]) -> dict[Part, str | None]:
    """The parts that the store was last made in.

    Args:
        runs: Records, oldest first.

    Returns:
        For each part the status of its last run, None if there was none; empty if no run had a
        part.
    """
    num_parts, status_of = 0, {}
    for run in runs:
        if part := Part.of_run(run):
            num_parts, status_of[part] = part.count, str(run["status"])
    parts = [Part(num_parts, number) for number in range(1, num_parts + 1)]
    return {part: status_of.get(part) for part in parts}
