"""The types of `embedder`'s functions, for type checkers and editors: `python -m tests.stub`.

They are made of the functions' own signatures and of the option classes.
"""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

import embedder
from tests.support import ROOT

STUB = ROOT / "embedder" / "__init__.pyi"


def text_of(hint: Any) -> str:
    """A type, as one writes it."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(text_of, get_args(hint)))
    if hint is type(None):
        return "None"
    return hint.__name__ if type(hint) is type else repr(hint).replace("typing.", "")


def arguments_of(node: ast.FunctionDef, function: Any) -> Iterator[str]:
    """The parameters of a function: its own as they are written, and those of its options."""
    written = {
        arg.arg: ast.unparse(arg.annotation)
        for arg in (*node.args.args, *node.args.kwonlyargs)
        if arg.annotation
    }
    is_by_name = False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not is_by_name:
            is_by_name = True
            yield "*"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        yield f"{name}: {written.get(name) or text_of(parameter.annotation)}{default}"


def make_stub() -> str:
    """The content of `embedder/__init__.pyi`."""
    module = ast.parse((ROOT / "embedder" / "api.py").read_text())
    imports, functions = [], []
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom) and "Store" not in ast.unparse(node):
            imports.append(ast.unparse(node))
        elif isinstance(node, ast.FunctionDef) and node.name in embedder.__all__:
            function = getattr(embedder, node.name)
            returned = ast.unparse(node.returns).strip("'")  # type: ignore[arg-type]
            arguments = ", ".join(arguments_of(node, function))
            functions.append(
                f'def {node.name}({arguments}) -> {returned}:\n    """{function.__doc__}"""\n'
            )
    lines = [
        *imports,
        "from typing import Literal",
        "from embedder.errors import EmbedderError as EmbedderError",
        "from embedder.store import Store as Store",
        "__version__: str",
        *functions,
    ]
    return _ruff("format", _ruff("check", "\n".join(lines), "--fix-only", "--select", "F401,I"))


def _ruff(command: str, text: str, *options: str) -> str:
    # Named as a module that is no package's: there, an import that is not used is one too many.
    words = [
        sys.executable,
        "-m",
        "ruff",
        command,
        *options,
        "--quiet",
        "--stdin-filename",
        "embedder/api.pyi",
        "-",
    ]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


if __name__ == "__main__":
    STUB.write_text(make_stub())
