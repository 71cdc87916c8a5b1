"""The report: a page that needs nothing but itself, whatever the names that it shows."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder.errors import RequestError
from embedder.report import figures
from embedder.report.page import MapPoint, Mistake, Report, write_report
from embedder.report.thumbnails import MAP_SIDE, thumbnail_of
from tests.report.test_thumbnails import encoded

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "$$x^2$$ @{image_id} @picture{safe} $index &lt;b&gt;",
    "\"quotes\" 'quotes' `back` \\ {{ 7 * 7 }} {% raw %}",
    "\u05e9\u05dc\u05d5\u05dd \u202egpj.exe 🍎",
)


def report_of(classes: tuple[str, ...] = HOSTILE) -> Report:
    """Every section is filled; names of classes are also names of images, files and tables."""
    count = len(classes)
    points = [
        MapPoint(f"{classes[i % count]}/{i}.jpg", classes[i % count], classes[i % 2], i % 7, i // 7)
        for i in range(40)
    ]
    interval = {"value": 0.875, "low": 0.8, "high": 0.9}
    bins = [
        {"confidence": 0.4, "accuracy": 0.3, "num_images": 3},
        {"confidence": 0.9, "accuracy": 0.8, "num_images": 30},
        {"confidence": float("nan"), "accuracy": float("nan"), "num_images": 0},
    ]
    return Report(
        title=classes[0],
        metrics={"accuracy": interval, "log_loss": interval, "new_metric": {"value": 0.5}},
        notes=[classes[1]],
        classes=list(classes),
        per_class=[
            {"class": name, "precision": 0.5, "recall": i**2 / 20, "f1": 0.25, "num_images": i + 9}
            for i, name in enumerate(classes)
        ][::-1],
        confusion=np.eye(count, k=1, dtype=int) * 3 + np.eye(count, dtype=int) * 5,
        reliability={"before": bins, "after": bins},
        learning_curve=[
            {"labels_per_class": n, "accuracy": 0.5, "low": 0.4, "high": 0.6} for n in (8, 1, 2)
        ],
        mistakes=[Mistake(f"{name}.jpg", name, classes[0], 0.99) for name in classes],
        map_points=points,
        tables={classes[3]: [{classes[0]: classes[1], "n": "1"}, {classes[0]: "b", "n": "2"}]},
        provenance={classes[4]: classes[1]},
    )


def empty_report() -> Report:
    return Report("Nothing", {}, [], [], [], np.zeros((0, 0), int), {}, [], [], [], {}, {})


# The page's source --------------------------------------------------------------------------


def ids_of(page: str) -> list[str]:
    return re.findall(r'<section id="([\w-]+)"', page)


def written(folder: Path, report: Report, has_pictures: bool = True) -> str:
    content = thumbnail_of(encoded(), MAP_SIDE) if has_pictures else None
    write_report(folder / "report.html", report, lambda _image_id, _side: content)
    return (folder / "report.html").read_text()


def test_every_section_is_there_and_what_is_empty_is_left_out(tmp_path: Path) -> None:
    names = "metrics notes confusion classes reliability curve mistakes map tables provenance"
    assert ids_of(written(tmp_path, report_of())) == names.split()
    page = written(tmp_path, empty_report())
    assert ids_of(page) == []
    assert len(page) < 20_000  # BokehJS is left out too
    no_map = written(tmp_path, replace(report_of(), map_points=[]))
    assert ids_of(no_map) == [name for name in names.split() if name != "map"]


class Source(HTMLParser):
    """Tags and texts of a page, as a browser would take it apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_names_are_text_in_the_source_and_never_tags(tmp_path: Path) -> None:
    source = Source(written(tmp_path, report_of()))
    assert set(HOSTILE) <= set(source.texts)
    scripts = [attributes for tag, attributes in source.tags if tag == "script"]
    assert [sorted(script) for script in scripts] == [["id", "type"], ["nonce"], ["nonce"]]
    images = [attributes for tag, attributes in source.tags if tag == "img"]
    assert len(images) == len(HOSTILE)
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in images)
    assert not [a for _, attributes in source.tags for a in attributes if a.startswith("on")]


def test_a_name_that_is_not_valid_text_does_not_stop_the_page(tmp_path: Path) -> None:
    page = written(tmp_path, replace(empty_report(), title="caf\udce9"))
    assert "<title>caf?</title>" in page


def test_missing_pictures_are_told_in_one_sentence(tmp_path: Path) -> None:
    assert 'id="missing"' not in written(tmp_path, report_of())
    page = written(tmp_path, report_of(), has_pictures=False)
    assert "The images could not be read, so this page has no pictures." in page
    assert "<img" not in page
    jpeg = thumbnail_of(encoded(), MAP_SIDE)
    write_report(
        tmp_path / "report.html",
        report_of(),
        lambda image_id, _side: None if image_id.endswith("/7.jpg") else jpeg,
    )
    page = (tmp_path / "report.html").read_text()
    assert "1 of 45 pictures are missing, because their images could not be read." in page


def test_metrics_are_shown_in_their_own_unit_with_their_interval(tmp_path: Path) -> None:
    text = re.sub(r"<[^>]+>|\s+", " ", written(tmp_path, report_of()))
    text = re.sub(r" +", " ", text)
    assert "Accuracy 87.5% 80.0% to 90.0%" in text
    assert "Log loss 0.875 0.800 to 0.900 less is better" in text
    assert "New metric 0.500" in text


def test_classes_come_with_the_lowest_recall_first(tmp_path: Path) -> None:
    page = written(tmp_path, report_of(("cats", "dogs", "elks", "emus", "owls")))
    table = page[page.index('<table id="per-class">') :]
    assert re.findall(r'<td class="name" data-value="(\w+)">', table) == [
        *("cats", "dogs", "elks", "emus", "owls")
    ]


def test_a_confusion_matrix_of_other_classes_is_refused() -> None:
    with pytest.raises(RequestError, match=r"Received: shape \(2, 2\) for 5 classes"):
        replace(report_of(), confusion=np.zeros((2, 2), int))


def columns_of(figure: dict[str, Any], column: str) -> list[Any]:
    """A column of the first data source of a figure that has it."""
    found = re.search(rf'\["{column}", (\[[^\]]*\])', json.dumps(figure))
    assert found is not None, column
    return list(json.loads(found[1]))


def test_the_matrix_holds_each_count_at_its_row_and_column() -> None:
    confusion = np.array([[7, 2, 1], [0, 5, 0], [0, 4, 0]])
    figure = figures.confusion_matrix(confusion, ["cats", "dogs", "owls"])
    assert columns_of(figure, "true") == ["cats", "cats", "cats", "dogs", "owls"]
    assert columns_of(figure, "predicted") == ["cats", "dogs", "owls", "dogs", "dogs"]
    assert columns_of(figure, "count") == [7, 2, 1, 5, 4]
    assert columns_of(figure, "share") == [0.7, 0.2, 0.1, 1.0, 1.0]


def test_neighbouring_classes_differ_in_colour_and_84_in_their_symbol() -> None:
    symbols = [figures.symbol(code) for code in range(85)]
    assert len(set(symbols[:84])) == 84
    assert symbols[84] == symbols[0]
    assert all(a[0] != b[0] for a, b in pairwise(symbols))


# In a browser -------------------------------------------------------------------------------

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1280,1000",  # the map fits in
)
# Where a place of a plot is in the window, in pixels; the plot is known by a model's name in it.
PLACE = """
const [name, x, y] = arguments;
const drawn = Bokeh.documents.find(d => d.get_model_by_name(name));
const plot = Bokeh.index.find_one(drawn.roots()[0]);
plot.el.scrollIntoView({block: "center"});
const canvas = plot.canvas_view.el.getBoundingClientRect();
return [canvas.x + plot.frame.x_scale.compute(x), canvas.y + plot.frame.y_scale.compute(y)];
"""
# Text of the tooltip that is shown, if any, and the widths of its pictures, 0 if broken.
TOOLTIP = """
const shown = [...document.querySelectorAll(".bk-Tooltip")].filter(e => e.checkVisibility());
if (!shown.length) return null;
const root = shown[0].shadowRoot;
return [root.querySelector(".bk-tooltip-content").textContent,
        [...root.querySelectorAll("img")].map(image => image.naturalWidth)];
"""
# What is written along an axis of the matrix.
LABELS = """
const drawn = Bokeh.documents.find(d => d.get_model_by_name("counts"));
const [axis] = Bokeh.index.find_one(drawn.roots()[0]).axis_views;
return axis.compute_labels([0, 1, 2, 3, 4]).items.map(item => item.text);
"""
IS_DRAWN = "return Bokeh.documents.length == arguments[0] && Bokeh.documents.every(d => d.is_idle)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, with a profile of its own, that keeps its console and its requests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SE_OFFLINE", "true")  # selenium's own downloads
        environment.setenv("SE_AVOID_STATS", "true")
        chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
        chrome.get("about:blank")  # the browser's own first page has requests of its own
        try:
            yield chrome
        finally:
            chrome.quit()


def show(browser: Any, folder: Path, report: Report, num_figures: int = 4) -> str:
    """Open the page of a report, wait until it is drawn, and return its address."""
    written(folder, report)
    for log in ("browser", "performance"):
        browser.get_log(log)  # what was before is forgotten
    browser.get((folder / "report.html").as_uri())
    wait_for(lambda: browser.execute_script(IS_DRAWN, num_figures))
    return str(browser.current_url)


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The browser, with the page of `report_of`: drawn once, for tests that leave it as it was."""
    show(browser, tmp_path_factory.mktemp("page"), report_of())
    return browser


def wait_for(answer: Callable[[], Any]) -> Any:
    """The first answer that is not nothing; within ten seconds."""
    deadline = time.monotonic() + 10
    while not (found := answer()):
        assert time.monotonic() < deadline, "nothing came in ten seconds"
        time.sleep(0.05)
    return found


def point_at(browser: Any, name: str, x: float, y: float) -> None:
    """Move the mouse over a place of the plot that holds the model `name`."""
    x, y = browser.execute_script(PLACE, name, x, y)
    move = {"type": "mouseMoved", "x": x, "y": y}
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", move)


def texts_of(browser: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    return list(browser.execute_script(script, selector))


@pytest.mark.browser
def test_the_page_asks_the_network_for_nothing_and_logs_no_error(
    browser: Any, tmp_path: Path
) -> None:
    address = show(browser, tmp_path, report_of())
    console = [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    assert console == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith(("data:", "blob:", "chrome:"))} == {address}


@pytest.mark.browser
def test_pictures_are_shown_and_names_are_text(page: Any) -> None:
    widths = page.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert widths == [64] * len(HOSTILE)
    names = list(HOSTILE)
    assert texts_of(page, "#per-class td.name") == names
    assert texts_of(page, "#map-legend bdi") == names
    assert texts_of(page, ".mistakes small") == [f"{name}.jpg" for name in names]
    assert texts_of(page, "h1, dt, h3:has(bdi)") == [names[0], names[3], names[4]]
    assert page.title == names[0]


@pytest.mark.browser
def test_a_tag_that_was_not_escaped_would_still_run_nothing(page: Any) -> None:
    ran = page.execute_script("""
        const button = document.createElement("button");
        button.setAttribute("onclick", "window.ran = true");
        document.body.append(button);
        button.click();
        button.remove();
        return window.ran;
    """)
    assert ran is None


@pytest.mark.browser
@pytest.mark.parametrize("place", range(len(HOSTILE)))
def test_a_point_of_the_map_tells_its_names_and_shows_its_picture(page: Any, place: int) -> None:
    point = report_of().map_points[place]
    point_at(page, "points", point.x, point.y)
    told = f"true: {point.label}predicted: {point.predicted}{point.image_id}"
    wait_for(lambda: page.execute_script(TOOLTIP) == [told, [64]])


@pytest.mark.browser
def test_names_along_the_matrix_are_not_read_as_formulas(page: Any) -> None:
    short = [name if len(name) <= 26 else f"{name[:25]}…" for name in HOSTILE]
    assert page.execute_script(LABELS) == short


@pytest.mark.browser
def test_a_cell_of_the_matrix_tells_its_classes_and_count(page: Any) -> None:
    point_at(page, "counts", 2, 1)  # column and row
    told = f"true: {HOSTILE[1]}predicted: {HOSTILE[2]}3 images, 37.5% of the true class"
    wait_for(lambda: page.execute_script(TOOLTIP) == [told, []])


@pytest.mark.browser
def test_the_map_can_be_narrowed_to_classes_and_to_mistakes(page: Any) -> None:
    report = report_of()
    buttons = page.find_elements("css selector", "#map-legend button")
    count = page.find_element("id", "num-chosen")
    shown = "return Bokeh.documents.flatMap(d => d.get_model_by_name('chosen') ?? [])[0].booleans"

    def choice() -> list[int]:
        return [place for place, chosen in enumerate(page.execute_script(shown)) if chosen]

    def placed(*classes: int, only_mistakes: bool = False) -> list[int]:
        return [
            place
            for place, point in enumerate(report.map_points)
            if HOSTILE.index(point.label) in classes
            and (point.label != point.predicted or not only_mistakes)
        ]

    assert choice() == placed(0, 1, 2, 3, 4)
    buttons[1].click()
    assert choice() == placed(1)
    assert count.text == "8 of 40 images"
    buttons[4].click()
    assert choice() == placed(1, 4)
    page.find_element("id", "only-mistakes").click()
    assert choice() == placed(1, 4, only_mistakes=True)
    assert 0 < len(choice()) < len(placed(1, 4))
    buttons[1].click()
    assert choice() == placed(4, only_mistakes=True)
    page.find_element("id", "all-classes").click()
    assert choice() == placed(0, 1, 2, 3, 4)


@pytest.mark.browser
def test_a_point_that_is_not_chosen_has_no_tooltip(page: Any) -> None:
    report = report_of()
    page.find_element("id", "all-classes").click()
    page.find_elements("css selector", "#map-legend button")[1].click()
    other, chosen = report.map_points[0], report.map_points[1]
    point_at(page, "points", chosen.x, chosen.y)
    wait_for(lambda: page.execute_script(TOOLTIP))
    point_at(page, "points", other.x, other.y)
    wait_for(lambda: page.execute_script(TOOLTIP) is None)
    page.find_element("id", "all-classes").click()


@pytest.mark.browser
def test_a_heading_sorts_the_classes_by_its_numbers(page: Any) -> None:
    # As text, 9 images would come after 13; by its digits, a recall of 0.05 after 0.2.
    headings = page.find_elements("css selector", "#per-class th")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", headings[0])
    headings[-1].click()
    assert texts_of(page, "#per-class td.number") == ["9", "10", "11", "12", "13"]
    headings[-1].click()
    assert texts_of(page, "#per-class td.number") == ["13", "12", "11", "10", "9"]
    assert headings[-1].get_attribute("aria-sort") == "descending"
    headings[1].click()
    assert texts_of(page, "#per-class td.name") == list(HOSTILE)


@pytest.mark.browser
def test_a_narrow_page_scrolls_only_downwards(browser: Any, tmp_path: Path) -> None:
    narrow = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
        show(browser, tmp_path, report_of(tuple(f"{i}-{'long' * 30}" for i in range(5))))
        assert browser.execute_script("return document.documentElement.scrollWidth") == 400
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_sections_that_are_left_out_leave_no_error(browser: Any, tmp_path: Path) -> None:
    show(browser, tmp_path, replace(report_of(), map_points=[], per_class=[]), num_figures=3)
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    written(tmp_path, empty_report())
    browser.refresh()
    assert texts_of(browser, "section") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
