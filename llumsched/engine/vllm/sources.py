"""The sources of a vLLM in a folder, read as syntax trees: nothing of it is imported.

So the same questions can be asked of the installed vLLM and of a wheel that is not installed, and
the answer does not need what vLLM needs. A name is followed through imports, and a member through
base classes. What is made when a module runs (``setattr``, ``exec``) is not seen.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

# Longer chains of imports are taken for a circle.
MAX_IMPORTS = 8

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Definition:
    """The statement that makes a name, and the module that it stands in."""

    module: str
    node: ast.stmt


class Sources:
    """The modules below a folder, each parsed once.

    Args:
        folder: the one with the folder ``vllm`` in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trees: dict[str, ast.Module | None] = {}
        self._classes: dict[tuple[str, str], tuple[Definition, ...]] = {}
        self._stored: dict[tuple[str, str], frozenset[str]] = {}

    def module(self, name: str) -> ast.Module | None:
        """A module's tree; ``None`` if there is no such module."""
        if name not in self._trees:
            path = self._path(name)
            self._trees[name] = ast.parse(path.read_bytes()) if path is not None else None
        return self._trees[name]

    def find(self, module: str, name: str) -> Definition | None:
        """Definition of a name in a module, wherever it is; the last one counts.

        A submodule is found as an empty ``Definition`` of itself.
        """
        return self._find(module, name, MAX_IMPORTS)

    def classes(self, module: str, name: str) -> tuple[Definition, ...]:
        """A class and its bases within vLLM, the class first; none if there is no such class."""
        key = (module, name)
        if key not in self._classes:
            self._classes[key] = tuple(self._with_bases(module, name, set()))
        return self._classes[key]

    def member(self, module: str, class_name: str, name: str) -> Definition | None:
        """The method, or class variable, that a class has by itself or from its bases."""
        for definition in self.classes(module, class_name):
            assert isinstance(definition.node, ast.ClassDef)
            found = _last_definition(definition.node.body, name)
            if found is not None:
                return Definition(definition.module, found)
        return None

    def stored_on_self(self, module: str, class_name: str) -> frozenset[str]:
        """Attributes that a class's methods, and those of its bases, set on ``self``."""
        key = (module, class_name)
        if key not in self._stored:
            self._stored[key] = frozenset(
                node.attr
                for definition in self.classes(module, class_name)
                for node in ast.walk(definition.node)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            )
        return self._stored[key]

    def _path(self, name: str) -> Path | None:
        stem = self.folder.joinpath(*name.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
        return None

    def _find(self, module: str, name: str, num_imports_left: int) -> Definition | None:
        tree = self.module(module)
        if tree is None or num_imports_left == 0:
            return None
        found = _last_definition(tree.body, name)
        if isinstance(found, ast.ImportFrom):
            source = self._imported_from(module, found)
            original = next(a.name for a in found.names if (a.asname or a.name) == name)
            followed = self._find(source, original, num_imports_left - 1)
            if followed is not None or source.split(".")[0] == module.split(".")[0]:
                return followed
        if found is None and (submodule := self.module(f"{module}.{name}")) is not None:
            return Definition(f"{module}.{name}", ast.Expr(ast.Constant(len(submodule.body))))
        return Definition(module, found) if found is not None else None

    def _imported_from(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        path = self._path(module)
        parts = module.split(".")
        num_dropped = statement.level - (path is not None and path.name == "__init__.py")
        package = parts[: len(parts) - num_dropped]
        return ".".join([*package, *([statement.module] if statement.module else [])])

    def _with_bases(
        self, module: str, name: str, seen: set[tuple[str, str]]
    ) -> Iterator[Definition]:
        found = self.find(module, name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return
        if (found.module, found.node.name) in seen:
            return
        seen.add((found.module, found.node.name))
        yield found
        for base in found.node.bases:
            while isinstance(base, ast.Subscript):
                base = base.value
            if isinstance(base, ast.Name):
                yield from self._with_bases(found.module, base.id, seen)


def parameters_of(definition: Definition, bases: Sequence[Definition]) -> set[str] | None:
    """Names of the parameters of a function, or of making an object of a class.

    Args:
        bases: a class's own definition and those of its bases; its fields are its parameters if
            none of them has an ``__init__``.

    Returns:
        ``None`` if anything is taken (``**kwargs``), or it is neither function nor class.
    """
    node = definition.node
    if isinstance(node, ast.ClassDef):
        initialisers = [
            found
            for base in bases
            if isinstance(base.node, ast.ClassDef)
            and (found := _last_definition(base.node.body, "__init__")) is not None
        ]
        if not initialisers:
            return {
                statement.target.id
                for base in bases
                if isinstance(base.node, ast.ClassDef)
                for statement in base.node.body
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            }
        node = initialisers[0]
    if not isinstance(node, Function) or node.args.kwarg is not None:
        return None
    return {argument.arg for argument in _arguments(node)}


def _arguments(function: Function) -> list[ast.arg]:
    given = function.args
    return [*given.posonlyargs, *given.args, *given.kwonlyargs]


def digest(definition: Definition) -> str:
    """A name for what a definition says: equal for equal code, whatever its comments, docstrings,
    annotations and line breaks are."""
    return hashlib.sha256(_plain(_stripped(definition.node)).encode()).hexdigest()[:12]


def source_of(definition: Definition) -> list[str]:
    """The lines that ``digest`` compares, to be read."""
    return ast.unparse(_stripped(definition.node)).splitlines()


def _last_definition(body: Sequence[ast.stmt], name: str) -> ast.stmt | None:
    """The last statement at the top of ``body`` that makes ``name``."""
    found: ast.stmt | None = None
    for statement in body:
        if isinstance(statement, ast.If | ast.Try):
            nested = [*statement.body, *statement.orelse]
            if isinstance(statement, ast.Try):
                nested += [s for handler in statement.handlers for s in handler.body]
                nested += statement.finalbody
            found = _last_definition(nested, name) or found
        elif name in _names_made(statement):
            found = statement
    return found


def _names_made(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return {statement.name}
        case ast.Assign():
            return {
                node.id
                for target in statement.targets
                for node in ast.walk(target)
                if isinstance(node, ast.Name)
            }
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Import():
            return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
        case ast.ImportFrom():
            return {alias.asname or alias.name for alias in statement.names}
    return set()


def _stripped(node: ast.stmt) -> ast.stmt:
    """A copy without docstrings, and without the annotations of functions."""
    copied = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(copied):
        if isinstance(inner, ast.ClassDef | Function):
            first = inner.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                inner.body = inner.body[1:] or [ast.Pass()]
        if isinstance(inner, Function):
            inner.returns = None
        elif isinstance(inner, ast.arg):
            inner.annotation = None
    return copied


def _plain(node: ast.AST) -> str:
    """A tree as text; ``ast.dump`` differs between versions of Python."""
    fields = []
    for name, value in ast.iter_fields(node):
        if value is None or value == [] or name in ("ctx", "kind", "type_comment"):
            continue
        parts = value if isinstance(value, list) else [value]
        texts = [_plain(part) if isinstance(part, ast.AST) else repr(part) for part in parts]
        fields.append(f"{name}=[{','.join(texts)}]")
    return f"{type(node).__name__}({','.join(fields)})"
