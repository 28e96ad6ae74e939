"""Check that a vLLM has all that is used of it, by its sources, before anything is imported.

The number of the version alone says too little (a build of one's own, or a patch release, may lack
what its neighbours have), and an import that fails says too little of why.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from llumsched.engine.vllm.compat import (
    DROPPABLE,
    WINDOW,
    UnsupportedVersion,
    how_to_install,
    installed_folder,
    is_in_window,
    minor_of,
    version_in,
)
from llumsched.engine.vllm.internals import INTERNALS, Internal
from llumsched.engine.vllm.sources import (
    Definition,
    Sources,
    digest,
    parameters_of,
)

# The folders of this package that may import vLLM.
IMPORTING = ("engine", "frontend")


def check_version(*, allow_other: bool = False) -> None:
    """Refuse a vLLM outside the window, or one that lacks what is used of it.

    Args:
        allow_other: only warn, on the standard error.

    Raises:
        UnsupportedVersion: in one sentence and its fix.
        ModuleNotFoundError: if vLLM is not installed.
    """
    complaint = why_unsupported(installed_folder())
    if complaint is None:
        return
    if not allow_other:
        raise UnsupportedVersion(f"{complaint}. {how_to_install()}")
    sys.stderr.write(f"llumsched: {complaint}; --allow-other-vllm tries anyway.\n")


def why_unsupported(folder: Path) -> str | None:
    """Reason why the vLLM in this folder is not supported, or ``None``."""
    version = version_in(folder)
    window = f"llumsched works with vLLM {', '.join(WINDOW[:-1])} and {WINDOW[-1]}"
    if not is_in_window(version):
        return f"vLLM {version} is installed, and {window}"
    moved = what_moved(Sources(folder))
    if moved:
        more = f" (and {len(moved) - 1} more)" if len(moved) > 1 else ""
        return f"vLLM {version} is installed, {window}, but this one lacks {moved[0]}{more}"
    return None


def what_moved(sources: Sources, internals: tuple[Internal, ...] | None = None) -> list[str]:
    """A phrase for each internal that a vLLM does not have as it is used.

    Args:
        internals: those to look for; by default all that are listed, and all that is imported.
    """
    if internals is None:
        listed = {internal.label for internal in INTERNALS}
        internals = (*INTERNALS, *(i for i in own_imports() if i.label not in listed))
    version = minor_of(version_in(sources.folder))
    return [
        complaint
        for internal in internals
        if not _is_later(internal.since, version)
        and (complaint := _complaint(sources, internal)) is not None
    ]


@functools.cache
def own_imports() -> tuple[Internal, ...]:
    """Names that this package imports of vLLM by an import statement, each once."""
    package = Path(__file__).parents[2]
    found: dict[str, Internal] = {}
    for path in sorted(path for folder in IMPORTING for path in (package / folder).rglob("*.py")):
        purpose = f"be imported by {path.relative_to(package)}"
        for node in ast.walk(ast.parse(path.read_bytes())):
            for module, name in _imports_of_vllm(node):
                internal = Internal(module, name, purpose)
                found.setdefault(internal.label, internal)
    return tuple(found.values())


def _imports_of_vllm(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
        for alias in node.names:
            yield node.module or "", alias.name
    elif isinstance(node, ast.Import):
        for alias in node.names:
            module, _, name = alias.name.rpartition(".")
            if module.split(".")[0] == "vllm":
                yield module, name


def bodies(sources: Sources) -> dict[str, Definition]:
    """The code of every listed internal that has any, by its label."""
    return {
        internal.label: found
        for internal in INTERNALS
        if not internal.on_instances and (found := _find(sources, internal)) is not None
    }


def fingerprint(sources: Sources) -> dict[str, str]:
    """A short digest of the code of every internal, by its label, in the order of the labels."""
    return {label: digest(found) for label, found in sorted(bodies(sources).items())}


def _is_later(since: str, version: str) -> bool:
    return since in WINDOW and version in WINDOW and WINDOW.index(since) > WINDOW.index(version)


def _places(internal: Internal) -> Iterator[tuple[str, str]]:
    for place in (internal.where, *internal.or_where):
        module, _, class_name = place.partition(":")
        yield module, class_name


def _find(sources: Sources, internal: Internal) -> Definition | None:
    for module, class_name in _places(internal):
        found = (
            sources.member(module, class_name, internal.name)
            if class_name
            else sources.find(module, internal.name)
        )
        if found is not None:
            return found
    return None


def _complaint(sources: Sources, internal: Internal) -> str | None:
    label = f"{internal.label} (used to {internal.for_what})"
    found = _find(sources, internal)
    if found is None:
        if internal.on_instances and any(
            internal.name in sources.stored_on_self(module, class_name)
            for module, class_name in _places(internal)
        ):
            return None
        return label
    missing = _missing_parameters(sources, internal, found)
    return f"the parameter {', '.join(missing)} of {label}" if missing else None


def _missing_parameters(sources: Sources, internal: Internal, found: Definition) -> list[str]:
    if not internal.parameters:
        return []
    class_name = internal.where.partition(":")[2]
    function = f"{class_name}.{internal.name}" if class_name else internal.name
    droppable = DROPPABLE.get(function, {})
    taken = parameters_of(found, sources.classes(found.module, internal.name))
    if taken is None:
        return []
    return [name for name in internal.parameters if name not in taken and name not in droppable]
