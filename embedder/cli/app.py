"""The command line: its commands, each imported when it is called, and its entry point."""

import ast
import importlib
import io
import os
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from embedder import __version__
from embedder.cli import interrupts

_COMPLETION = "_EMBEDDER_COMPLETE"  # what the scripts of shells set
# Of each command, in the order of the help, the module that has it.
MODULES = {
    "extract": "extraction",
    "inspect": "extraction",
    "verify": "extraction",
    "backbones": "machine",
    "doctor": "machine",
    "demo": "extraction",
    "train": "heads",
    "evaluate": "heads",
    "predict": "heads",
    "export": "heads",
    "finetune": "finetuning",
    "compare": "finetuning",
    "run": "job_file",
}


class _LazyGroup(TyperGroup):
    """Knows each command's name and help, and imports its module when it is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name) for name in MODULES}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - Typer's signature
        """A command that has its help alone."""
        if found := self.commands.get(cmd_name):
            found.short_help = _docstrings(MODULES[cmd_name])[cmd_name]
        return found

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A command that can be called."""
        name, found, others = super().resolve_command(ctx, args)
        return name, found and load(args[0]), others


@cache
def _docstrings(module: str) -> dict[str, str]:
    """Of each function of a module of this package, without importing it."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_docstring(node) or "" for node in functions}


def load(name: str) -> Any:
    """The command of a name, as click has it."""
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    module = importlib.import_module(f"embedder.cli.{MODULES[name]}")
    single.command(name)(getattr(module, name))
    return typer.main.get_command(single)


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing Rich takes longer than all else that `--help` does
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Images in, a feature store out: embed large image archives with frozen backbones."""


def main() -> None:
    """Entry point of the `embedder` command."""
    for stream in (sys.stdout, sys.stderr):  # names of files hold anything, in any locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # For the user's own scripts; here `--engine` tells what Keras runs on.
    os.environ.pop("KERAS_BACKEND", None)
    shell, _, instruction = os.environ.get(_COMPLETION, "").partition("_")
    if instruction == "source":  # the order that click has; Typer's is the other
        os.environ[_COMPLETION] = f"source_{shell}"
    with interrupts.ending_the_process():
        app(prog_name="embedder")
