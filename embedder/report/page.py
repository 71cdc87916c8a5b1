"""The report of a model: one page, `report.html`, that needs nothing but itself."""

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from embedder.errors import RequestError
from embedder.files import whole_file
from embedder.report import figures
from embedder.report.thumbnails import MAP_SIDE, MISTAKE_SIDE, Thumbnails

_NUM_CONFUSIONS = 12  # pairs of classes that are named beside the matrix

_SHARES = {  # metrics of 0 to 1, which are shown in percent, and more is better
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "top_5": "Top-5 accuracy",
    "mean_average_precision": "Mean average precision",
    "coarse_accuracy": "Coarse accuracy",
    "hierarchical_f1": "Hierarchical F1",
}
_LOSSES = {"log_loss": "Log loss", "ece": "Calibration error"}  # less is better


@dataclass(frozen=True)
class Mistake:
    """An image whose predicted class is not its own, and how sure the model was of it."""

    image_id: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class MapPoint:
    """An image's place on the map of the embeddings; `x` and `y` have no unit."""

    image_id: str
    label: str
    predicted: str
    x: float
    y: float


@dataclass(frozen=True)
class Report:
    """What the page says. What is empty is left out of it.

    Attributes:
        title: Of the page.
        metrics: `value`, and `low` and `high`, the bounds of its 95 % interval, by metric.
        notes: Sentences a reader must know: split, groups, unlabelled images, calibration.
        classes: Names, in the order of the confusion matrix.
        per_class: `class`, `precision`, `recall`, `f1` (0 to 1) and `num_images` of each class.
        confusion: int (n_classes, n_classes), numbers of images; rows true, columns predicted.
        reliability: For `before` and `after` calibration, bins of `confidence`, `accuracy` and
            `num_images`.
        learning_curve: Points of `labels_per_class`, `accuracy`, `low` and `high`.
        mistakes: The most confident first.
        map_points: Two thousand make a page of some 8 MB.
        tables: More tables by heading; each row has the same columns.
        provenance: What the model was made from and with.
    """

    title: str
    metrics: dict[str, dict[str, float]]
    notes: list[str]
    classes: list[str]
    per_class: list[dict[str, Any]]
    confusion: NDArray[np.integer]
    reliability: dict[str, list[dict[str, Any]]]
    learning_curve: list[dict[str, Any]]
    mistakes: list[Mistake]
    map_points: list[MapPoint]
    tables: dict[str, list[dict[str, str]]]
    provenance: dict[str, str]

    def __post_init__(self) -> None:
        """Check that the confusion matrix is of these classes."""
        num_classes = len(self.classes)
        if self.confusion.size and self.confusion.shape != (num_classes, num_classes):
            raise RequestError(
                f"`confusion` must be empty or have a row and a column for each class. "
                f"Received: shape {self.confusion.shape} for {num_classes} classes"
            )


def write_report(path: Path, report: Report, thumbnail: Callable[[str, int], bytes | None]) -> None:
    """Write the page.

    Args:
        path: File to write, or to write over.
        report: What the page says.
        thumbnail: From an image's id and a side in pixels to a JPEG file, `thumbnail_of`; None
            where the image cannot be had, which the page then says.

    Raises:
        OSError: The file cannot be written.
    """
    pictures = Thumbnails(thumbnail)
    mistakes = [
        asdict(mistake) | {"picture": pictures.get(mistake.image_id, MISTAKE_SIDE)}
        for mistake in report.mistakes
    ]
    map_classes = _map_classes(report)
    drawn = _figures(report, _map_columns(report, map_classes, pictures))
    write_page(
        path,
        "report.html.j2",
        report=report,
        tiles=[_tile(name, interval) for name, interval in report.metrics.items()],
        per_class=sorted(report.per_class, key=lambda row: (row["recall"], row["f1"])),
        confusions=_confusions(report),
        mistakes=mistakes,
        map_legend=[(name, *figures.symbol(i)) for i, name in enumerate(map_classes)],
        marker_paths=figures.MARKERS,
        figures=drawn,
        num_missing=pictures.num_missing,
        num_pictures=pictures.num_asked,
        bokeh=figures.script(),
        # Only scripts that carry it run: a name that escaped the escaping would still do nothing.
        nonce=secrets.token_urlsafe(),
    )


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template of this package, which escapes its values.

    Raises:
        OSError: The file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["share"] = lambda part, whole: f"{100 * part / whole:.2f}"
    # Bokeh's documents define a model where they first name it: sorted keys would break them.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    page = environment.get_template(template).render(values)
    with whole_file(path) as file:
        file.write(page.encode("utf-8", "replace"))  # names of files need not be valid text


def _percent(share: float) -> str:
    return f"{share:.1%}" if np.isfinite(share) else "-"


def _tile(name: str, interval: dict[str, float]) -> dict[str, Any]:
    """A metric as it is shown: its title, its value and bounds as text, and what is better."""
    show = _percent if name in _SHARES else "{:.3f}".format
    has_bounds = bool(
        np.isfinite([interval.get("low", np.nan), interval.get("high", np.nan)]).all()
    )
    return {
        "title": (_SHARES | _LOSSES).get(name, name.replace("_", " ").capitalize()),
        "value": show(interval["value"]),
        "bounds": [show(interval["low"]), show(interval["high"])] if has_bounds else None,
        "bar": interval if has_bounds and name in _SHARES else None,
        "is_loss": name in _LOSSES,
    }


def _confusions(report: Report) -> list[dict[str, Any]]:
    """The pairs of classes most often taken one for the other, the most frequent first."""
    if not report.confusion.size:
        return []
    wrong = report.confusion * (1 - np.eye(len(report.classes), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_NUM_CONFUSIONS]
    pairs = [divmod(int(index), len(report.classes)) for index in order]
    return [
        {
            "label": report.classes[row],
            "predicted": report.classes[column],
            "count": int(wrong[row, column]),
            "share": wrong[row, column] / report.confusion[row].sum(),
        }
        for row, column in pairs
        if wrong[row, column]
    ]


def _figures(report: Report, map_columns: dict[str, list[Any]]) -> dict[str, Any]:
    """Documents for BokehJS by the id of the element that they are drawn in."""
    drawn: dict[str, Any] = {}
    if report.confusion.size:
        drawn["confusion-figure"] = figures.confusion_matrix(report.confusion, report.classes)
    if any(report.reliability.values()):
        drawn["reliability-figure"] = figures.reliability_diagram(report.reliability)
    if report.learning_curve:
        drawn["curve-figure"] = figures.learning_curve(report.learning_curve)
    if report.map_points:
        drawn["map-figure"] = figures.embedding_map(map_columns)
    return drawn


def _map_classes(report: Report) -> list[str]:
    """Labels that the map's points have, in the report's order; others, if any, at the end."""
    order = {name: i for i, name in enumerate(report.classes)}
    labels = {point.label for point in report.map_points}
    return sorted(labels, key=lambda label: (order.get(label, len(order)), label))


def _map_columns(report: Report, classes: list[str], pictures: Thumbnails) -> dict[str, list[Any]]:
    """Columns of `figures.embedding_map`."""
    codes = {name: code for code, name in enumerate(classes)}
    columns: dict[str, list[Any]] = {
        name: [getattr(point, name) for point in report.map_points]
        for name in ("x", "y", "label", "predicted", "image_id")
    }
    addresses = [pictures.get(point.image_id, MAP_SIDE) for point in report.map_points]
    columns["picture"] = [
        f'<img src="{address}" alt="" style="height:{MAP_SIDE * 3 // 2}px;flex:none">'
        if address
        else ""
        for address in addresses
    ]
    columns["code"] = [codes[point.label] for point in report.map_points]
    columns["is_wrong"] = [int(point.label != point.predicted) for point in report.map_points]
    return columns
