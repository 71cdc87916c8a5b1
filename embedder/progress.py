"""How far a run is, for people: a bar on a terminal, a line that changes in a notebook."""

import html
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import progress as bars
from rich.console import Console

if TYPE_CHECKING:
    from embedder.extraction import OnProgress, Progress

_LINE_SECONDS = 5.0  # between plain lines
_NOTEBOOK_SECONDS = 0.2  # between changes of a line


def ignore(_: object) -> None:
    """Show nothing."""


@contextmanager
def show_progress(
    console: Console | None = None, elsewhere: "OnProgress" = ignore
) -> "Iterator[OnProgress]":
    """What to call with a run's `Progress`, so that it is seen.

    Args:
        console: Where; standard error if None.
        elsewhere: What to call where this is neither a terminal nor a notebook.
    """
    console = console or Console(stderr=True)
    if console.is_jupyter:
        line = _NotebookLine()
        yield line
        line.show()
    elif console.is_terminal:
        with bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[speed]}", markup=False),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[failures]}", markup=False),
            console=console,
            transient=True,
        ) as bar:
            yield _BarPainter(bar)
    else:
        yield elsewhere


class _Speed:
    """Images per second since a phase began."""

    def __init__(self) -> None:
        self.phase, self.began = "", time.monotonic()

    def entered(self, progress: "Progress") -> bool:
        is_new = progress.phase != self.phase
        if is_new:
            self.phase, self.began = progress.phase, time.monotonic()
        return is_new

    def of(self, progress: "Progress") -> float:
        return progress.num_done / max(time.monotonic() - self.began, 1e-9)

    def line(self, progress: "Progress") -> str:
        speed = self.of(progress)
        left = (progress.num_images - progress.num_done) / max(speed, 1e-9)
        return (
            f"{progress.num_done:,} of {progress.num_images:,}, {speed:,.0f} images/s, "
            f"{left:,.0f} s left, {progress.num_failures:,} failed"
        )


class _BarPainter:
    def __init__(self, bar: bars.Progress) -> None:
        self._bar, self._speed = bar, _Speed()
        self._task = bar.add_task("starting", total=None, speed="", failures="")

    def __call__(self, progress: "Progress") -> None:
        if self._speed.entered(progress):
            self._bar.reset(self._task, total=progress.num_images or None)
        failures = f"{progress.num_failures:,} failed" if progress.num_failures else ""
        self._bar.update(
            self._task,
            description=progress.phase,
            completed=progress.num_done,
            speed=f"{self._speed.of(progress):,.0f} images/s" if progress.num_done else "",
            failures=failures,
        )


class _NotebookLine:
    """One output of a cell, which changes. Rich's own bar would need ipywidgets."""

    def __init__(self) -> None:
        from IPython.display import display

        self._speed, self._last = _Speed(), 0.0
        self._progress: Progress | None = None
        self._output = display({"text/plain": "starting"}, raw=True, display_id=True)

    def __call__(self, progress: "Progress") -> None:
        self._progress = progress
        if self._speed.entered(progress) or time.monotonic() - self._last > _NOTEBOOK_SECONDS:
            self._last = time.monotonic()
            self.show()

    def show(self) -> None:
        if (progress := self._progress) is None:
            return
        text, bar = progress.phase, ""
        if progress.num_images:
            text += f": {self._speed.line(progress)}"
            bar = f'<progress value="{progress.num_done}" max="{progress.num_images}"></progress> '
        content = {"text/plain": text, "text/html": bar + html.escape(text)}
        self._output.update(content, raw=True)


class LinePrinter:
    """Plain lines: each phase as it begins, and how far it is."""

    def __init__(self, console: Console) -> None:
        """Print to this console."""
        self._console, self._speed, self._last = console, _Speed(), 0.0

    def __call__(self, progress: "Progress") -> None:
        """Print a line, if it is time for one."""
        if self._speed.entered(progress):
            self._last = time.monotonic()
            count = f" {progress.num_images:,} images" if progress.num_images else ""
            self._console.print(f"{progress.phase}{count}")
        elif time.monotonic() - self._last > _LINE_SECONDS:
            self._last = time.monotonic()
            self._console.print(self._speed.line(progress))
