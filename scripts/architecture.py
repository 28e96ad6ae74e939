"""Generated parts of ``docs/architecture.md``: messages, and who has which threads and sockets.

The code is read as text: nothing of it is imported, so that no engine is needed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from scripts.pages import table

PACKAGE = Path(__file__).parents[1] / "llumsched"

# Folder -> the process that its code runs in.
PROCESSES = {
    "frontend/workers/door.py": "launcher",
    "frontend/workers/launcher_server.py": "launcher",
    "frontend/workers": "frontend",
    "frontend": "frontend",
    "pool": "launcher",
    "scheduler": "scheduler",
    "instance": "instance",
    "migration": "instance",
    "engine": "instance",
    "wire": "every process",
}
PROTOCOLS = (
    ("wire/control.py", "Scheduler, instances, frontends"),
    ("core/migration/messages.py", "The two ends of a migration"),
    ("migration/messages.py", "Their connection"),
    ("frontend/workers/messages.py", "Launcher and frontends"),
)
_BASES = {"Message", "ToDestination", "ToSource"}
_SECTION = re.compile(r"^# -{2,} ?(?P<title>.+?) ?-{2,}$")


def messages() -> str:
    """Every message between processes, a table a pair of processes, from its class's docstring."""
    parts = []
    for path, title in PROTOCOLS:
        source = (PACKAGE / path).read_text(encoding="utf-8")
        rows = [
            (f"`{node.name}`", _section(source, node.lineno), _first_sentence(node))
            for node in ast.parse(source).body
            if isinstance(node, ast.ClassDef) and _is_message(node)
        ]
        parts += [f"**{title}** (`llumsched/{path}`)", table(("message", "", ""), rows)]
    return "\n\n".join(parts)


def threads_and_sockets() -> str:
    """Each thread that our code starts and each ZMQ socket that it opens, by process."""
    rows = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        process = _process_of(name)
        if process is None:
            continue
        for kind, what in _opened(ast.parse(path.read_text(encoding="utf-8"))):
            rows.append((process, kind, what, f"`{name}`"))
    return table(("process", "", "name or kind", "file"), sorted(set(rows)))


def _process_of(name: str) -> str | None:
    for folder in sorted(PROCESSES, key=len, reverse=True):
        if name == folder or name.startswith(f"{folder}/"):
            return PROCESSES[folder]
    return None


def _opened(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "threading.Thread":
            name = next((k.value for k in node.keywords if k.arg == "name"), None)
            is_plain = isinstance(name, ast.Constant)
            if not isinstance(name, ast.Name):  # else the caller names it
                plain = ast.literal_eval(name) if name and is_plain else _pattern(name)
                yield "thread", f"`{plain}`"
        elif called.endswith("._run_thread"):
            yield "thread", f"`{ast.literal_eval(node.args[0])}`"
        elif called.endswith(".socket") and node.args:
            kind = ast.unparse(node.args[0])
            if kind.startswith("zmq."):
                yield "socket", kind.removeprefix("zmq.")


def _pattern(name: ast.expr | None) -> str:
    if isinstance(name, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in name.values)
    return ast.unparse(name) if name is not None else "?"


def _is_message(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id in _BASES for base in node.bases)


def _section(source: str, line: int) -> str:
    """The heading comment that stands above a line."""
    for text in reversed(source.splitlines()[: line - 1]):
        if match := _SECTION.match(text):
            return match["title"].removeprefix("control: ")
    return ""


def _first_sentence(node: ast.ClassDef) -> str:
    text = " ".join((ast.get_docstring(node) or "").split())
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
