"""Figures of the report, as documents that BokehJS draws in the reader's browser.

Names of classes and images come from anywhere. They reach the page only as values of columns, which
BokehJS escapes where a tooltip shows them, and as `PlainText`, which it does not read as TeX.
"""

from typing import Any

import numpy as np
from bokeh import models
from bokeh.embed import json_item
from bokeh.plotting import figure
from bokeh.resources import Resources
from numpy.typing import NDArray

# Okabe and Ito's colours, which the colour-blind tell apart, less the yellow and the black that
# cannot be seen on white and on dark paper.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_GREY = "#888888"  # as far from white paper as from dark
_RIGHT, _WRONG = COLOURS[0], COLOURS[4]

# Shapes of the map's points, and the same as paths in a box of 16 x 16 for its legend. A hundred
# classes need more than colours: these make 84 pairs, after which they repeat.
MARKERS = {
    "circle": "M8 2a6 6 0 1 0 .01 0z",
    "square": "M3 3h10v10H3z",
    "triangle": "M8 2l6.5 11h-13z",
    "diamond": "M8 1l5 7-5 7-5-7z",
    "inverted_triangle": "M8 14L1.5 3h13z",
    "plus": "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z",
    "star": "M8 1l2 4.8 5 .4-3.8 3.3 1.2 5L8 11.8l-4.4 2.7 1.2-5L1 6.2l5-.4z",
    "hex": "M5 3h6l3 5-3 5H5L2 8z",
    "x": "M3 3l10 10M13 3L3 13",
    "asterisk": "M8 2v12M2 8h12M4 4l8 8M12 4l-8 8",
    "square_pin": "M2 2q6 3 12 0-3 6 0 12-6-3-12 0 3-6 0-12z",
    "triangle_pin": "M8 1q1.500 6 6.500 12-6.500-2-13 0Q6.500 7 8 1z",
    "y": "M8 8v6M8 8L3 3M8 8l5-5",
    "dash": "M2 8h12",
}

_CELL_PIXELS = 11  # the least at which a row's name is legible beside it
_MAX_CELL_PIXELS = 64
_MATRIX_PIXELS = 640  # what a matrix fills, where its cells need not be larger or smaller
_MAX_NAMED = 120  # classes: with more, cells are smaller and named by their tooltips alone
_UNNAMED_PIXELS = 1000  # what a matrix of more classes fills: the page's width
_MAX_COUNTED = 12  # classes: up to here each cell holds its count
_MAX_NAME_LENGTH = 26

_TOOLTIP = '<div style="font:13px/1.4 system-ui,sans-serif;color:#1b1f24;max-width:340px">{}</div>'
_NAME = "<bdi style='font-weight:600;overflow-wrap:anywhere'>@{{{}}}</bdi>"


def script() -> str:
    """BokehJS, whole, without what these figures do not use: widgets, WebGL and TeX."""
    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def symbol(code: int) -> tuple[str, str]:
    """Colour and marker of the class of a code: neighbours differ in colour."""
    markers = tuple(MARKERS)
    return COLOURS[code % len(COLOURS)], markers[code // len(COLOURS) % len(markers)]


def confusion_matrix(confusion: NDArray[np.integer], classes: list[str]) -> dict[str, Any]:
    """Draw which classes are taken for which, as shares of the true class.

    Args:
        confusion: (n_classes, n_classes), numbers of images; rows true, columns predicted.
        classes: Names, in the order of the rows.

    Returns:
        Document for `Bokeh.embed.embed_item`. Empty cells are not in it: of 81 classes, nine in
        ten are empty.
    """
    rows, columns = np.nonzero(confusion)
    counts = confusion[rows, columns]
    shares = counts / confusion.sum(axis=1)[rows]
    has_counts = len(classes) <= _MAX_COUNTED
    deepest = 0.65 if has_counts else 1.0  # below it, a count can be read on the colour
    source = models.ColumnDataSource(
        {
            "row": rows.tolist(),
            "column": columns.tolist(),
            "true": [classes[row] for row in rows],
            "predicted": [classes[column] for column in columns],
            "count": counts.tolist(),
            "share": shares.tolist(),
            "colour": np.where(rows == columns, _RIGHT, _WRONG).tolist(),
            # By the square root, or one mistake in fifty could not be seen beside the diagonal.
            "alpha": (0.1 + (deepest - 0.1) * np.sqrt(shares)).tolist(),
        }
    )
    plot = _matrix_figure(classes)
    cells = plot.rect(
        "column", "row", 1, 1, source=source, fill_color="colour", fill_alpha="alpha",
        line_color=None,
    )  # fmt: skip
    if has_counts:
        plot.text(
            "column", "row", "count", source=source, name="counts", text_align="center",
            text_baseline="middle", text_font_size="13px",
        )  # fmt: skip
    told = f"true: {_NAME.format('true')}<br>predicted: {_NAME.format('predicted')}"
    told += "<br>@count images, @share{0.0%} of the true class"
    plot.add_tools(models.HoverTool(tooltips=_TOOLTIP.format(told), renderers=[cells]))
    return dict(json_item(plot))


def _matrix_figure(classes: list[str]) -> figure:
    count = len(classes)
    is_named = count <= _MAX_NAMED
    cell = min(max(_MATRIX_PIXELS // count, _CELL_PIXELS), _MAX_CELL_PIXELS)
    side = cell * count if is_named else _UNNAMED_PIXELS
    plot = figure(
        frame_width=side,
        frame_height=side,
        x_range=models.Range1d(start=-0.5, end=count - 0.5, bounds="auto"),
        y_range=models.Range1d(start=count - 0.5, end=-0.5, bounds="auto"),
        x_axis_location="above",
        x_axis_label="predicted",
        y_axis_label="true",
        tools="" if is_named else "box_zoom,reset",
        toolbar_location=None if is_named else "above",
        active_drag=None,  # or a finger could not scroll the page
    )
    plot.toolbar.logo = None
    plot.axis.ticker = models.FixedTicker(ticks=list(range(count)) if is_named else [])
    plot.axis.major_label_overrides = {
        i: models.PlainText(text=_short(c)) for i, c in enumerate(classes)
    }
    plot.axis.major_label_text_font_size = f"{min(cell - 1, 13)}px"
    plot.axis.major_tick_line_color = None
    plot.xaxis.major_label_orientation = "vertical" if cell < _MAX_CELL_PIXELS else 0.6
    plot.grid.visible = 2 <= count <= _MAX_NAMED
    return plot


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}…"


def reliability_diagram(reliability: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Draw how often predictions of a confidence are right (Guo et al., arXiv 1706.04599).

    Args:
        reliability: For `before` and `after` calibration, bins of `confidence` and `accuracy`
            (means, 0 to 1) and `num_images`; the area of a point is its bin's share of the images.
    """
    plot = _chart("confidence", "accuracy", height=400)
    plot.x_range = plot.y_range = models.Range1d(start=-0.02, end=1.02)
    plot.xaxis.formatter = models.NumeralTickFormatter(format="0%")
    plot.line([0, 1], [0, 1], color=_GREY, line_dash="dotted", line_width=1.5)
    styles = {"before": (_WRONG, "square"), "after": (_RIGHT, "circle")}
    points: list[Any] = []
    for name, bins in reliability.items():
        filled = [bin_ for bin_ in bins if bin_["num_images"]]
        colour, marker = styles.get(name, (COLOURS[2], "diamond"))
        counts = np.array([bin_["num_images"] for bin_ in filled])
        source = models.ColumnDataSource(
            {
                "confidence": [bin_["confidence"] for bin_ in filled],
                "accuracy": [bin_["accuracy"] for bin_ in filled],
                "count": counts.tolist(),
                "size": (6 + 30 * np.sqrt(counts / max(counts.sum(), 1))).tolist(),
                "name": [name] * len(filled),
            }
        )
        plot.line("confidence", "accuracy", source=source, color=colour, line_alpha=0.5)
        points.append(
            plot.scatter(
                "confidence", "accuracy", source=source, size="size", marker=marker, color=colour,
                fill_alpha=0.35, legend_label=f"{name} calibration",
            )
        )  # fmt: skip
    told = "@name calibration<br>confidence @confidence{0.0%}<br>accuracy @accuracy{0.0%}"
    told += "<br>@count images"
    plot.add_tools(models.HoverTool(tooltips=_TOOLTIP.format(told), renderers=points))
    plot.legend.location = "top_left"
    plot.legend.glyph_height = plot.legend.glyph_width = 16
    plot.legend.background_fill_color = plot.legend.border_line_color = None
    # The one part of a plot that is drawn as HTML, and does not heed the page's `--bk-` colours.
    plot.legend.stylesheets = [".bk-item .bk-label {color: var(--ink); font-family: system-ui}"]
    return dict(json_item(plot))


def learning_curve(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw accuracy over the number of labels.

    Args:
        curve: Points of `labels_per_class`, `accuracy`, `low` and `high` (0 to 1).
    """
    points = sorted(curve, key=lambda point: point["labels_per_class"])
    names = "labels_per_class", "accuracy", "low", "high"
    source = models.ColumnDataSource({name: [point[name] for point in points] for name in names})
    plot = _chart("labels per class", "accuracy", x_axis_type="log", height=400)
    plot.xaxis.ticker = models.FixedTicker(ticks=[point["labels_per_class"] for point in points])
    plot.xgrid.ticker = plot.xaxis.ticker
    x, y = "labels_per_class", "accuracy"
    plot.varea(x, "low", "high", source=source, color=_RIGHT, fill_alpha=0.18)
    plot.line(x, y, source=source, color=_RIGHT, line_width=2)
    dots = plot.scatter(x, y, source=source, color=_RIGHT, size=8)
    told = "@labels_per_class labels per class<br>accuracy @accuracy{0.0%}"
    told += "<br>@low{0.0%} to @high{0.0%}"
    plot.add_tools(models.HoverTool(tooltips=_TOOLTIP.format(told), renderers=[dots], mode="vline"))
    return dict(json_item(plot))


def _chart(x_label: str, y_label: str, **options: Any) -> figure:
    plot = figure(
        x_axis_label=x_label, y_axis_label=y_label, sizing_mode="stretch_width", tools="",
        toolbar_location=None, **options,
    )  # fmt: skip
    plot.yaxis.formatter = models.NumeralTickFormatter(format="0%")
    return plot


def embedding_map(points: dict[str, list[Any]]) -> dict[str, Any]:
    """Draw the map of the images.

    Args:
        points: Columns of one length: `x`, `y`, `code` (index of the class among the map's),
            `label`, `predicted`, `image_id`, `is_wrong` (0 or 1: ringed) and `picture`, an `<img>`
            or nothing. The page's script narrows the filter named `chosen`.
    """
    symbols = [symbol(code) for code in points["code"]]
    colours = [colour for colour, _ in symbols]
    markers = [marker for _, marker in symbols]
    source = models.ColumnDataSource(
        {**points, "colour": colours, "marker": markers}, name="points"
    )
    plot = figure(
        width=800, height=760, sizing_mode="scale_width", match_aspect=True,
        toolbar_location="above", tools="pan,box_zoom,reset", active_drag="pan",
    )  # fmt: skip
    # The wheel alone goes on scrolling the page.
    plot.add_tools(wheel := models.WheelZoomTool(modifiers="ctrl"))
    plot.toolbar.active_scroll = wheel
    plot.toolbar.logo = None
    plot.axis.visible = plot.grid.visible = False
    chosen = models.CDSView(filter=models.BooleanFilter(name="chosen"))
    plot.scatter("x", "y", source=source, size=4, color=_GREY, alpha=0.25)
    dots = plot.scatter(
        "x", "y", source=source, view=chosen, marker="marker", size=9, color="colour",
        fill_alpha=0.75,
    )  # fmt: skip
    plot.scatter(
        "x", "y", source=source, view=chosen, size=13, fill_color=None, line_color=_GREY,
        line_alpha="is_wrong",
    )  # fmt: skip
    # `safe` is "as it is": the picture is our own tag around base64.
    told = "<div style='display:flex;gap:8px'>@picture{safe}"
    told += f"<div>true: {_NAME.format('label')}<br>predicted: {_NAME.format('predicted')}"
    told += "<br><bdi style='color:#666;font-size:11px;overflow-wrap:anywhere'>@image_id</bdi>"
    told += "</div></div>"
    plot.add_tools(models.HoverTool(tooltips=_TOOLTIP.format(told), renderers=[dots], limit=3))
    return dict(json_item(plot))
