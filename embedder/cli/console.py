"""What the command line shows: messages, progress, summaries, and exit statuses."""

import logging
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as ProgressBar,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from embedder.errors import EmbedderError
from embedder.files import local_path, whole_file

if TYPE_CHECKING:
    from embedder.checks import Check
    from embedder.extraction import Progress, Summary

_PLAIN_LINE_SECONDS = 5.0
_PLAIN_WIDTH = 160  # characters, where the output is not a terminal
# File names hold anything: they must never be read as markup.
out = Console(
    markup=False,
    emoji=False,
    highlight=False,
    soft_wrap=True,
    width=None if sys.stdout.isatty() else _PLAIN_WIDTH,
)
err = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, stderr=True)


@contextmanager
def exit_status(quiet: bool = False) -> Iterator[None]:
    """Turn a user's mistake into a message and an exit status; show what the package tells."""
    logger = logging.getLogger("embedder")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.addHandler(handler := _Messages())
    try:
        yield
    except EmbedderError as error:
        err.print(f"Error: {error}")
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt as error:
        reason = str(error) or "interrupted"
        with suppress(OSError):  # the terminal may be gone
            err.print(
                f"\n{reason[0].upper()}{reason[1:]}. Finished shards are kept: the same command "
                f"continues from here."
            )
        raise typer.Exit(1) from None
    finally:
        logger.removeHandler(handler)


class _Messages(logging.Handler):
    """Shows what the package logs, such as which weights were loaded, once, on standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = ("Warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()
        if message not in self._shown:
            self._shown.add(message)
            err.print(message)


def write_text(path: str, text: str) -> None:
    """Write a file that was asked for on the command line.

    Raises:
        EmbedderError: It cannot be written.
    """
    with writing(path), whole_file(local_path(path)) as file:
        file.write(text.encode())


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Say of a file that was asked for that it cannot be written.

    Raises:
        EmbedderError: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise EmbedderError(f"{path} cannot be written: {error.strerror or error}") from error


def started() -> float:
    """When this process began, so that a run's total holds the imports too."""
    import psutil

    return float(psutil.Process().create_time())


@contextmanager
def progress(quiet: bool) -> Iterator[Any]:
    """What to call with a run's `Progress`: a bar on a terminal, plain lines elsewhere."""
    if quiet:
        yield lambda _: None
    elif err.is_terminal:
        bar = ProgressBar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failures]}", markup=False),
            console=err,
            transient=True,
        )
        with bar:
            yield _BarPainter(bar)
    else:
        yield _LinePrinter()


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


class _BarPainter:
    def __init__(self, bar: ProgressBar) -> None:
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


class _LinePrinter:
    def __init__(self) -> None:
        self._speed, self._last = _Speed(), 0.0

    def __call__(self, progress: "Progress") -> None:
        if self._speed.entered(progress):
            self._last = time.monotonic()
            count = f" {progress.num_images:,} images" if progress.num_images else ""
            err.print(f"{progress.phase}{count}")
        elif time.monotonic() - self._last > _PLAIN_LINE_SECONDS:
            self._last = time.monotonic()
            speed = self._speed.of(progress)
            left = (progress.num_images - progress.num_done) / max(speed, 1e-9)
            err.print(
                f"{progress.num_done:,} of {progress.num_images:,}, {speed:,.0f} images/s, "
                f"{left:,.0f} s left, {progress.num_failures:,} failed"
            )


def print_summaries(summaries: "list[Summary]") -> None:
    """Show what became of a run, store by store."""
    for number, summary in enumerate(summaries):
        if number:
            out.print()
        print_summary(summary)


def print_summary(summary: "Summary") -> None:
    """Show what became of one store."""
    new = f"{summary.num_embedded:,} new" if summary.num_embedded else "nothing new"
    facts = {"rows": f"{_total(summary.total_rows)} in the store, {new}"}
    for name, count in {
        "changed": summary.num_changed,
        "same content": summary.num_updated,
        "dropped": summary.num_dropped,
        "repeated lines": summary.num_repeated,
    }.items():
        if count:
            facts[name] = f"{count:,}"
    total = _total(summary.total_failures)
    facts["failures"] = f"{total} in the store, {summary.num_failures:,} new"
    if summary.num_retried:
        facts["tried again"] = f"{summary.num_retried:,} that had failed"
    if summary.unreadable:
        facts["unreadable"] = (
            f"{summary.unreadable.total():,} that cannot be read now keep the rows they have"
        )
    if summary.repaired:
        names = ", ".join(summary.repaired)
        facts["repaired"] = f"{len(summary.repaired):,} damaged files made again: {names}"
    if summary.skipped:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary.skipped.most_common(5))
        facts["other files"] = f"{summary.skipped.total():,} left out: {kinds}"
    if summary.num_deleted and not summary.options["prune"]:
        facts["deleted"] = (
            f"{summary.num_deleted:,} that the source no longer has; `--prune` drops them"
        )
    if summary.num_embedded:
        stages = ", ".join(
            f"{stage} {s:,.1f} s" for stage, s in summary.record()["seconds"].items()
        )
        facts["speed"] = (
            f"{summary.images_per_second:,.1f} images/s, {summary.seconds_total:,.1f} s in all"
        )
        facts["stages"] = f"{stages} (summed over threads)"
        facts["bottleneck"] = summary.bottleneck
    facts["store"] = summary.store
    facts["next"] = f"embedder inspect {shell_word(summary.store)}"
    print_facts(facts)
    if reasons := summary.failures + summary.unreadable:
        print_reasons(reasons)


def _total(count: int | None) -> str:
    return "an unknown number" if count is None else f"{count:,}"


def print_facts(facts: dict[str, str]) -> None:
    """Show names and values, a line each."""
    # Not a table: it would break paths and commands over lines, and they are to be copied.
    width = max(map(len, facts))
    for name, value in facts.items():
        out.print(Text(f"{name:<{width}}", style="bold"), value, sep="  ")


def print_table(heads: tuple[str, ...], rows: list[list[str]]) -> None:
    """Show rows of texts under their heads."""
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_reasons(reasons: Counter[tuple[str, str]]) -> None:
    """Show the most frequent failures, by stage and kind of reason."""
    from embedder.extraction import grouped_reasons

    table = Table("failures", "stage", "reason", box=None, pad_edge=False)
    groups = grouped_reasons(reasons)
    for (stage, error), count in groups.most_common(10):
        table.add_row(f"{count:,}", stage, error)
    out.print()
    out.print(table)
    if len(groups) > 10:
        out.print(f"and {len(groups) - 10:,} more reasons, in failures/*.parquet")


def print_checks(checks: "list[Check]") -> None:
    """Show checks; end with exit status 1 if one failed."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        table.add_row("pass" if check.passed else "FAIL", check.name, check.detail)
    out.print(table)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def interval(metric: dict[str, float]) -> str:
    """A metric with its interval, as text."""
    return f"{metric['value']:.3f}  (95 % interval {metric['low']:.3f} to {metric['high']:.3f})"


def size(num_bytes: int) -> str:
    """Bytes as text."""
    return f"{num_bytes / 1e6:,.1f} MB"


def shell_word(text: str) -> str:
    """Quote a word of a command to type, also a name that is not UTF-8, as bash reads it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        escaped = text.replace("\\", "\\\\").replace("'", "\\'")
        return f"$'{os.fsencode(escaped).decode('utf-8', 'backslashreplace')}'"
    return shlex.quote(text)
