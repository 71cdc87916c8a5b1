"""From functions to commands: an option of the command line for each field of an option class."""

import inspect
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from embedder.cli import console
from embedder.errors import RequestError
from embedder.options import description_of, options_of

Source = Annotated[str, typer.Argument(help="Folder, glob, manifest (.txt .csv .parquet) or URL.")]
StorePath = Annotated[str, typer.Argument(help="Folder of the feature store.")]
ModelPath = Annotated[str, typer.Argument(help="Folder of the model.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
JsonFile = Annotated[str | None, typer.Option("--json", help="Write what is found to this file.")]

_IMAGE_SIZE = "image_size"
_NUMBER = r"[-+]?[0-9.]+(e[-+]?[0-9]+)?"
_FLAGS = {"layers": "layer", "blocks": "block", "column": "layer"}  # else as the field's name
# What is typed for a value that is no text; MISSING is the default.
_WORDS: dict[str, dict[str, Any]] = {
    "batch_size": {"auto": None},
    "duplicates": {"auto": MISSING, "none": None},
    "augment": {"none": ()},
}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function.

    A parameter of an option class becomes an option for each of its fields, see `options_of`. What
    is wrong with these, like any `EmbedderError`, ends the command with a message and an exit
    status.

    Returns:
        What Typer makes a command of. Its attribute `made_of` takes what was typed, by the names of
        the command's parameters, and makes the function's arguments of it.
    """
    classes = options_of(function)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in classes:
            parameters += map(_parameter, classes[name][1])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def made_of(typed: dict[str, Any]) -> dict[str, Any]:
        arguments = dict(typed)
        for name, (cls, chosen) in classes.items():
            values = {field.name: _value(field, arguments.pop(field.name)) for field in chosen}
            arguments[name] = cls(**{k: v for k, v in values.items() if v is not MISSING})
        return arguments

    @wraps(function)
    def run(**typed: Any) -> None:
        with console.exit_status(typed.get("quiet", False)):
            function(**made_of(typed))

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.made_of = made_of  # type: ignore[attr-defined]
    return run


def option(
    text: str, choices: Callable[[], Iterable[str]] = tuple, *words: str, flag: str = ""
) -> Any:
    """An option whose values are offered in shells, also after a comma.

    Args:
        text: What it is for.
        choices: Gives its values.
        *words: What its values are, in help.
        flag: Its name, where it is not that of its parameter.
    """

    def complete(incomplete: str) -> list[str]:
        before = incomplete[: incomplete.rfind(",") + 1]
        return [f"{before}{choice}" for choice in choices()]

    names = [flag] if flag else []
    metavar = f"<{'|'.join(words)}>" if words else None
    return typer.Option(*names, help=text, metavar=metavar, autocompletion=complete)


def backbone_names() -> list[str]:
    """Names of the networks there are."""
    from embedder.backbones import BACKBONES

    return list(BACKBONES)


def parts_of(texts: list[str] | None) -> list[str]:
    """What is given in several options, or in one with commas; a comma may be of a file's name."""
    whole = (([text] if os.path.exists(text) else text.split(",")) for text in texts or ())
    return [part.strip() for parts in whole for part in parts]


def _parameter(field: Field[Any]) -> inspect.Parameter:
    """The parameter of a command that stands for a field, whose class checks what is typed."""
    kind = _core(field.type)
    is_tuple = get_origin(kind) is tuple and field.name != _IMAGE_SIZE
    is_list = is_tuple and get_args(kind)[1] is ...
    item = _core(get_args(kind)[0]) if is_tuple else kind
    annotation: Any = str | None
    own: Any = field.default
    default: Any = None if own in (None, ()) else str(own)
    if kind is bool:
        annotation, default = bool, False
    elif is_list:
        annotation = list[str] | None
    elif is_tuple:
        annotation, default = tuple[str, str], tuple(map(str, own))
    words = [*_words_of(field), *(get_args(item) if get_origin(item) is Literal else ())]
    metavar = words + [item.__name__] * (item in (int, float))
    made = option(
        description_of(field.type),
        lambda: words,
        *(["SIDE", "HEIGHTxWIDTH"] if field.name == _IMAGE_SIZE else metavar),
        flag=f"--{_FLAGS.get(field.name, field.name)}".replace("_", "-"),
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, made],
    )


def _value(field: Field[Any], typed: Any) -> Any:
    """What a field's class is given for what was typed; MISSING where nothing was."""
    if typed in (None, (), [], False):
        return MISSING
    words = _words_of(field)
    if isinstance(typed, list):
        parts = parts_of(typed)
        return words[parts[0]] if parts[0] in words and len(parts) == 1 else parts
    if typed in words:
        return words[typed]
    if words and not re.fullmatch(_NUMBER, typed):
        raise RequestError(
            f"`{field.name}` must be {', '.join(words)} or a number. Received: {typed}"
        )
    if field.name == _IMAGE_SIZE:
        height, cross, width = typed.lower().partition("x")
        if not (height.isdecimal() and (width.isdecimal() or not cross)):
            raise RequestError(
                f"`image_size` must be SIDE or HEIGHTxWIDTH in pixels, such as 224 or 192x256. "
                f"Received: {typed}"
            )
        return int(height), int(width or height)
    return typed


def _words_of(field: Field[Any]) -> dict[str, Any]:
    return {} if isinstance(field.default, int) else _WORDS.get(field.name, {})


def _core(annotation: Any) -> Any:
    """The type of an annotation, without notes and without None."""
    while get_origin(annotation) in (Annotated, Union, UnionType):
        if get_origin(annotation) is Annotated:
            annotation = annotation.__origin__
        else:
            annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
    return annotation
