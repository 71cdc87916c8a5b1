"""The package before and after a change, as a table: how it is laid out, and what it costs to load.

    python benchmarks/house.py --before FOLDER_OF_644654a --rounds 10

Parameters are counted without `self` and `cls`, lines of code without docstrings, comments and
blank lines. Import levels are the longest chain of imports, those within functions included, in
which a package counts as one. Seconds are those of a whole process, the median and the fastest,
both sides in turn; the first run of each, which says what is loaded, is not among them.
"""

import argparse
import ast
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARIES = ("dask", "keras", "pyarrow", "sklearn")
MOST_PARAMETERS = 6
STARTS = {
    "`python`": "pass",
    "`import embedder`": "import embedder",
    "`from embedder.decode import decode_rgb`": "from embedder.decode import decode_rgb",
    "`embedder --help`": "import runpy, sys; sys.argv[1:] = ['--help']; "
    "runpy.run_module('embedder', run_name='__main__')",
}
LOADED = f"print(*[name for name in {LIBRARIES} if name in sys.modules], file=sys.stderr)"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules_of(package: Path) -> dict[str, str]:
    """The text of each module, by its path within the package."""
    return {str(p.relative_to(package)): p.read_text() for p in sorted(package.rglob("*.py"))}


def imports_of(text: str) -> Iterator[str]:
    """What a module imports from the package: `store` for `embedder.store` and what is in it."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("embedder."))


def num_levels(modules: dict[str, str]) -> int:
    """The longest chain of modules beside each other, of which each imports the next."""
    graph: dict[str, set[str]] = {}
    for path, text in modules.items():
        top = path.split("/")[0].removesuffix(".py")
        graph.setdefault(top, set()).update(imports_of(text))

    @functools.cache
    def height(module: str) -> int:
        return 1 + max(
            (height(other) for other in graph[module] & graph.keys() - {module}), default=0
        )

    return max(map(height, graph))


def num_parameters(function: Function) -> int:
    of = function.args
    named = [arg.arg for arg in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
    return len(set(named) - {"self", "cls"}) + bool(of.vararg) + bool(of.kwarg)


def num_code_lines(text: str) -> int:
    """Lines that are neither blank, nor a comment, nor of a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node):
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = (line.strip() for n, line in enumerate(text.splitlines(), 1) if n not in docstrings)
    return sum(bool(line) and not line.startswith("#") for line in lines)


def layout_of(root: Path) -> dict[str, str]:
    """What the table says of a checkout before any of it is run."""
    modules = modules_of(root / "embedder")
    functions = [
        node
        for text in modules.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, Function)
    ]
    length, name = max(((f.end_lineno or 0) - f.lineno + 1, f.name) for f in functions)
    return {
        "modules in the package's root": str(sum("/" not in path for path in modules)),
        "packages in it": str(sum(path.endswith("/__init__.py") for path in modules)),
        "import levels": str(num_levels(modules)),
        "longest function": f"`{name}`, {length} lines",
        f"functions of more than {MOST_PARAMETERS} parameters": str(
            sum(num_parameters(function) > MOST_PARAMETERS for function in functions)
        ),
        "lines of code": f"{sum(map(num_code_lines, modules.values())):,}",
    }


def run(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, in which `embedder` is that of a checkout."""
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(
        command, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
    )


def start(roots: list[Path], code: str, rounds: int) -> list[str]:
    """What a cell says of each checkout: seconds, and libraries that are then loaded."""
    cells = []
    for root in roots:
        done = run(root, f"import sys\ntry: exec({code!r})\nfinally: {LOADED}")
        cells.append(", ".join(done.stderr.split()) or "none of them")
    seconds: list[list[float]] = [[] for _ in roots]
    for _ in range(rounds):
        for root, times in zip(roots, seconds, strict=True):
            begin = time.perf_counter()
            run(root, code)
            times.append(time.perf_counter() - begin)
    return [
        f"{statistics.median(times):.2f} s, {min(times):.2f} s; {loaded}"
        for times, loaded in zip(seconds, cells, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout of another commit")
    parser.add_argument("--after", type=Path, default=ROOT, help="checkout, this one by default")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    roots = [options.before.resolve(), options.after.resolve()]
    before, after = map(layout_of, roots)
    print("| | before | after |\n|---|---|---|")
    for name, value in before.items():
        print(f"| {name} | {value} | {after[name]} |")
    for name, code in STARTS.items():
        print(f"| {name} | {' | '.join(start(roots, code, options.rounds))} |", flush=True)
    print(f"\nOf libraries, {', '.join(LIBRARIES)} are looked for.")


if __name__ == "__main__":
    main()
