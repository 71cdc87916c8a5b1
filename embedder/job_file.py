"""Job files: a TOML file that names the commands of a whole pipeline, one after the other."""

import string
import tomllib
from pathlib import Path
from typing import Any

from embedder.demo import images_folder
from embedder.errors import JobError

_COMMAND, _ARGUMENTS = "command", "arguments"


def read_job(path: Path, overrides: dict[str, str]) -> list[list[str]]:
    """The commands of a job, as they would be typed.

    A job has `[variables]`, and `[[steps]]` with a `command`, its `arguments`, and its options by
    their long names: `class-weight = "balanced"` is `--class-weight balanced`, `true` a flag, and
    a list an option that is given several times. `{name}` in a text is the variable's value, and
    `{demo}` the folder of the demo images.

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
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise JobError(f"The job {path} cannot be read: {error}") from error
    steps = content.get("steps")
    if set(content) - {"variables", "steps"} or not isinstance(steps, list) or not steps:
        raise JobError(
            f"A job must have [[steps]], may have [variables], and nothing else. Received: {path} "
            f"with {', '.join(content) or 'nothing'}"
        )
    variables = {name: _text(value, {}) for name, value in content.get("variables", {}).items()}
    if unknown := set(overrides) - set(variables):
        raise JobError(
            f"--set must name a variable of the job: {', '.join(variables) or 'it has none'}. "
            f"Received: {', '.join(sorted(unknown))}"
        )
    variables |= overrides
    return [_words(step, variables) for step in steps]


def _words(step: dict[str, Any], variables: dict[str, str]) -> list[str]:
    if not isinstance(step, dict) or not isinstance(step.get(_COMMAND), str):
        raise JobError(f"A step must name its `{_COMMAND}`. Received: {step}")
    arguments = step.get(_ARGUMENTS, [])
    if not isinstance(arguments, list):
        raise JobError(f"`{_ARGUMENTS}` of a step must be a list. Received: {arguments!r}")
    words = [step[_COMMAND], *(_text(value, variables) for value in arguments)]
    for name, value in step.items():
        if name in (_COMMAND, _ARGUMENTS):
            continue
        for one in value if isinstance(value, list) else [value]:
            if one is True:
                words.append(f"--{name}")
            elif one is not False:
                words += [f"--{name}", _text(one, variables)]
    return words


def _text(value: Any, variables: dict[str, str]) -> str:
    if "{demo}" in str(value):
        variables = variables | {"demo": str(images_folder())}
    try:
        return string.Formatter().vformat(str(value), (), variables)
    except (KeyError, IndexError, ValueError) as error:
        raise JobError(
            f"{{name}} in a job must be one of its variables: {', '.join(variables) or 'none'}. "
            f"Received: {value!r}"
        ) from error
