"""Classes of options: they check their values, and say of each what it is for."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

from pydantic import ConfigDict, InstanceOf, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from embedder.errors import RequestError

Class = TypeVar("Class", bound=type)
Name = InstanceOf[str]  # of a file, or one that holds it: such names need not be UTF-8
_DOC_WIDTH = 100  # characters


@dataclass_transform(frozen_default=True)
def checked(cls: Class) -> Class:
    """Make a class, whose annotations are pydantic's, a frozen dataclass.

    Making one raises a `RequestError` where a value breaks its rule, or is of no attribute.
    """
    made: Any = pydantic_dataclass(cls, frozen=True, config=ConfigDict(extra="forbid"))
    check = made.__init__

    @wraps(check)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            check(self, *args, **values)
        except ValidationError as error:
            raise RequestError.of(error.errors(), made.__dataclass_fields__) from None

    made.__init__ = init
    result: Class = documented(made)
    return result


def documented(cls: Class) -> Class:
    """Add the descriptions of a class's attributes to its docstring."""
    lines = [
        described(name, annotation, indent=4)
        for name, annotation in get_type_hints(cls, include_extras=True).items()
        if description_of(annotation)
    ]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])
    return cls


def options_of(function: Callable[..., Any]) -> dict[str, tuple[Any, list[Field[Any]]]]:
    """Parameters whose annotation is an option class: by name, the class and its fields.

    Some of the fields are chosen as in `Annotated[RunOptions, {"engine"}]`.
    """
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        cls, *only = get_args(parameter.annotation) or [parameter.annotation]
        if is_dataclass(cls):
            found[name] = cls, [field for field in fields(cls) if not only or field.name in only[0]]
    return found


def described(name: str, annotation: Any, indent: int) -> str:
    """Lines of a docstring on an attribute, so many spaces from the margin."""
    text = f"{' ' * indent}{name}: {description_of(annotation)}"
    return textwrap.fill(text, _DOC_WIDTH, subsequent_indent=" " * (indent + 4))


def description_of(annotation: Any) -> str:
    """What is said of an attribute in its annotation, or else in a part of that; or ''."""
    for note in getattr(annotation, "__metadata__", ()):  # of Annotated
        if isinstance(note, FieldInfo) and note.description:
            return note.description
    return next(filter(None, map(description_of, get_args(annotation))), "")
