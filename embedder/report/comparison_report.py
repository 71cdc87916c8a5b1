"""The page of a comparison: models side by side, with intervals and verdicts."""

from pathlib import Path
from typing import Any

from embedder.evaluation import SIGNIFICANCE_LEVEL
from embedder.report.page import write_page

_ROOM = 0.02  # of accuracy, beside the widest intervals


def write_comparison(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one page that needs nothing but itself.

    Args:
        path: File to write, or to write over.
        rows: Of `analysis.row_of`, the first being what the others are compared with.

    Raises:
        OSError: The file cannot be written.
    """
    write_page(
        path,
        "comparison.html.j2",
        title=f"{len(rows)} models compared",
        rows=rows,
        num_images=f"{rows[0]['num_images']:,}",
        low=max(0.0, min(row["accuracy"]["low"] for row in rows) - _ROOM),
        high=min(1.0, max(row["accuracy"]["high"] for row in rows) + _ROOM),
        significant=SIGNIFICANCE_LEVEL,
    )
