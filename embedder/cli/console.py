"""What the command line shows: messages, progress, summaries, and exit statuses."""

import logging
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from embedder.errors import EmbedderError
from embedder.files import local_path, os_errors_as, whole_file
from embedder.progress import LinePrinter, ignore, show_progress

if TYPE_CHECKING:
    from embedder.checks import Check
    from embedder.extraction import OnProgress, Summary
    from embedder.store import Part

_MAX_PARTS = 20  # of a store, that are named
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
    unwritable = os_errors_as(EmbedderError, f"{path} cannot be written")
    with unwritable, whole_file(local_path(path)) as file:
        file.write(text.encode())


def started() -> float:
    """When this process began, so that a run's total holds the imports too."""
    import psutil

    return float(psutil.Process().create_time())


def progress(quiet: bool) -> "AbstractContextManager[OnProgress]":
    """What to call with a run's `Progress`: a bar on a terminal, plain lines elsewhere."""
    return nullcontext(ignore) if quiet else show_progress(err, LinePrinter(err))


def print_parts(status_of: "dict[Part, str | None]") -> None:
    """Show how the last run of each part of a store ended."""
    others = [f"{p} {status or 'never run'}" for p, status in status_of.items() if status != "done"]
    facts = [f"{len(status_of) - len(others):,} of {len(status_of):,} parts done"]
    facts += others[:_MAX_PARTS]
    if len(others) > _MAX_PARTS:
        facts.append(f"and {len(others) - _MAX_PARTS:,} more")
    out.print("; ".join(facts))


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
    if part := summary.options["part"]:
        num_images = f"{summary.num_inputs:,}" if summary.num_inputs else "none"
        facts["part"] = f"{part}, with {num_images} of the source's images"
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
        facts["stages"] = f"{stages} (summed over processes and threads)"
        facts["bottleneck"] = summary.bottleneck
    facts["store"] = summary.store
    facts["next"] = f"embedder inspect {shell_word(summary.store)}"
    print_facts(facts)
    print_reasons(summary.failures + summary.unreadable)


def _total(count: int | None) -> str:
    return "an unknown number" if count is None else f"{count:,}"


def print_facts(facts: dict[str, str]) -> None:
    """Show names and values, a line each."""
    # Not a table: it would break paths and commands over lines, and they are to be copied.
    width = max(map(len, facts))
    for name, value in facts.items():
        out.print(Text(f"{name:<{width}}", style="bold"), value, sep="  ")


def print_table(heads: tuple[str, ...], rows: list[list[str]]) -> None:
    """Show rows of texts, under their heads if there are any."""
    table = Table(*heads, box=None, pad_edge=False, show_header=bool(heads))
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_reasons(reasons: Counter[tuple[str, str]]) -> None:
    """Show the most frequent failures, if any, by stage and kind of reason."""
    from embedder.extraction import grouped_reasons

    groups = grouped_reasons(reasons)
    if not groups:
        return
    rows = [[f"{count:,}", stage, error] for (stage, error), count in groups.most_common(10)]
    out.print()
    print_table(("failures", "stage", "reason"), rows)
    if len(groups) > 10:
        out.print(f"and {len(groups) - 10:,} more reasons, in failures/*.parquet")


def print_checks(checks: "list[Check]") -> None:
    """Show checks; end with exit status 1 if one failed."""
    rows = [["pass" if check.passed else "FAIL", check.name, check.detail] for check in checks]
    print_table((), rows)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def interval(value: float, low: float, high: float) -> str:
    """A metric with its interval, as text."""
    return f"{value:.3f}  (95 % interval {low:.3f} to {high:.3f})"


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
