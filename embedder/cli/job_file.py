"""The command `run`: a job file, in TOML, names the commands of a whole pipeline."""

import shlex
import string
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from embedder.cli import console
from embedder.cli.options import command
from embedder.errors import EmbedderError, JobError
from embedder.files import regular
from embedder.sources import images_folder

MAX_BYTES = 2**20  # of a job
MAX_CHARACTERS = 2**16  # of a word, which systems take no longer
_NUM_SHOWN = 200  # characters of what is refused
_RULE = "In a job {name} must be a variable's name, and {{ is a brace"
_UsageError: Any = typer.BadParameter.__base__  # Typer gives it no name of its own
_COMMAND, _ARGUMENTS = "command", "arguments"


def read_job(path: Path, overrides: dict[str, str]) -> list[list[str]]:
    """The commands of a job, as they would be typed.

    A job has `[variables]`, and `[[steps]]` with a `command`, its `arguments`, and its options by
    their long names: `class-weight = "balanced"` is `--class-weight balanced`, `true` a flag, and
    a list an option that is given several times. `{name}` in a text is the variable's value, and
    `{demo}` the folder of the demo images; nothing else is done in braces.

    Args:
        path: The TOML file.
        overrides: Variables to take in place of the file's.

    Returns:
        For each step, the words after `embedder`.

    Raises:
        JobError: The file cannot be read, or is no job.
        SourceError: The job is about the demo images, which are not installed.
    """
    try:
        with regular(path).open("rb") as file:
            encoded = file.read(MAX_BYTES + 1)
        if len(encoded) > MAX_BYTES:
            raise JobError(f"A job must have at most {MAX_BYTES:,} bytes. Received: {path}")
        content = tomllib.loads(encoded.decode())
    except RecursionError:
        raise JobError(f"The job {path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise JobError(f"The job {path} cannot be read: {error}") from error
    steps = content.get("steps")
    if set(content) - {"variables", "steps"} or not isinstance(steps, list) or not steps:
        raise JobError(
            f"A job must have [[steps]], may have [variables], and nothing else. Received: {path} "
            f"with {', '.join(content) or 'nothing'}"
        )
    given = content.get("variables", {})
    if not isinstance(given, dict):
        raise JobError(f"[variables] of a job must be a table. Received: {_shown(given)}")
    variables = {name: _text(value, {}) for name, value in given.items()}
    if unknown := set(overrides) - set(variables):
        raise JobError(
            f"--set must name a variable of the job: {', '.join(variables) or 'it has none'}. "
            f"Received: {', '.join(sorted(unknown))}"
        )
    variables |= overrides
    job: list[list[str]] = []
    num_characters = 0
    for step in steps:
        words: list[str] = []
        job.append(words)
        for word in _words(step, variables):
            num_characters += len(word)
            if num_characters > MAX_BYTES:
                raise JobError(
                    f"The words of a job must have at most {MAX_BYTES:,} characters in all. "
                    f"Received: {path}"
                )
            words.append(word)
    return job


def _words(step: Any, variables: dict[str, str]) -> Iterator[str]:
    if not isinstance(step, dict) or not isinstance(step.get(_COMMAND), str):
        raise JobError(f"A step must name its `{_COMMAND}`. Received: {_shown(step)}")
    arguments = step.get(_ARGUMENTS, [])
    if not isinstance(arguments, list):
        raise JobError(f"`{_ARGUMENTS}` of a step must be a list. Received: {_shown(arguments)}")
    yield step[_COMMAND]
    for value in arguments:
        yield _text(value, variables)
    for name, value in step.items():
        if name in (_COMMAND, _ARGUMENTS):
            continue
        for one in value if isinstance(value, list) else [value]:
            if one is not False:
                yield f"--{name}"
            if not isinstance(one, bool):
                yield _text(one, variables)


def _text(value: Any, variables: dict[str, str]) -> str:
    if isinstance(value, (dict, list)):
        raise JobError(
            f"A variable, an argument or an option must be a text or a number. "
            f"Received: {_shown(value)}"
        )
    text = str(value)
    if "{demo}" in text:
        variables = variables | {"demo": str(images_folder())}
    try:
        parts = [
            part for fixed, *field in string.Formatter().parse(text) for part in (fixed, field)
        ]
    except ValueError as error:  # a brace alone
        raise JobError(f"{_RULE}. Received: {_shown(value)}: {error}") from error
    words = [part if isinstance(part, str) else _value(part, variables, text) for part in parts]
    if sum(map(len, words)) > MAX_CHARACTERS:
        raise JobError(
            f"A word of a job must have at most {MAX_CHARACTERS:,} characters. "
            f"Received: {_shown(value)}"
        )
    return "".join(words)


def _value(field: list[str | None], variables: dict[str, str], text: str) -> str:
    """What stands for a part of a text in braces: name, format and conversion."""
    name, form, conversion = field
    if name is None:  # nothing, after the last of the braces
        return ""
    if form or conversion or name not in variables:
        known = ", ".join(variables) or "none"
        raise JobError(
            f"{{name}} in a job must be one of its variables: {known}. Received: {_shown(text)}"
        )
    return variables[name]


def _shown(value: Any) -> str:
    """A value as it was written, as far as one wants to read it."""
    text = repr(value)
    return text if len(text) <= _NUM_SHOWN else f"{text[:_NUM_SHOWN]}..."


@command
def run(
    job: Annotated[str, typer.Argument(help="Job file, in TOML; see jobs/.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, in place of the job's own; repeatable."),
    ] = None,
) -> None:
    """Run the commands of a job file, one after the other; what is done is not done again."""
    overrides = {}
    for text in set_ or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise JobError(f"`--set` must be NAME=VALUE. Received: {text}")
        overrides[name] = value
    from embedder.cli.app import app

    steps = read_job(Path(job), overrides)
    _check_steps(steps)
    for words in steps:
        console.out.print(f"$ embedder {shlex.join(words)}\n")
        if status := app(words, standalone_mode=False):
            raise typer.Exit(status)
        console.out.print()


def _check_steps(steps: list[list[str]]) -> None:
    """Refuse a job before anything is started, where a step is no command or has bad options."""
    from embedder.cli.app import MODULES, load

    for words in steps:
        if words[0] not in MODULES or words[0] == "run":
            raise JobError(
                f"A step's command must be one of embedder's, but run. Received: {words[0]}"
            )
        try:
            step = load(words[0])
            step.callback.made_of(step.make_context(words[0], words[1:]).params)
        except (_UsageError, EmbedderError, typer.Exit) as error:
            reason = error.format_message() if isinstance(error, _UsageError) else str(error)
            if isinstance(error, typer.Exit):  # --help
                reason = "it runs nothing"
            raise JobError(
                f"A step must be what could be typed. Received: {shlex.join(words)}: {reason}"
            ) from error
