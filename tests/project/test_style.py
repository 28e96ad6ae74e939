"""Rules of the code that no linter has."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("llumsched", "policies", "simulator", "benchmarks", "scripts", "tests")
MAX_LINES = 500
# A docstring names its subject: with one of these, a reader has to guess it.
PRONOUNS = frozenset(
    ("He", "It", "Its", "That", "Their", "These", "They", "This", "Those", "What", "Whether", "Who")
) | {"Whoever", "Whose"}


def modules(*folders: str) -> Iterator[Path]:
    """Every file of code, once: the links inside the package are not followed."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


def statements(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements in a node. Expressions, most of a tree, are not walked."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        found = getattr(node, field, ())
        if isinstance(found, list):
            yield found
            for child in found:
                yield from statements(child)


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The name of each documented thing of a module, with its docstring."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    bodies = list(statements(module))
    for node in itertools.chain((module,), *bodies):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", path.stem), text
    for before, after in itertools.chain.from_iterable(map(itertools.pairwise, bodies)):
        # A string after an assignment documents what it assigns.
        match before, after:
            case ast.Assign() | ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                yield ast.unparse(before).partition("\n")[0][:40], text


def test_no_file_is_too_long_to_have_one_subject() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in modules(*FOLDERS)
    }
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_no_docstring_opens_with_a_pronoun() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}"
        for path in modules(*FOLDERS)
        for name, text in docstrings(path)
        if text.split()[0].strip("`.,;:") in PRONOUNS
    ]
    assert not found, "name the subject:\n" + "\n".join(found)
