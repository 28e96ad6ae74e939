"""Sources of a package read without importing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llumsched.engine.vllm.sources import Sources, digest, parameters_of, source_of

Write = Callable[..., Sources]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Sources of modules `p.NAME`, by name and text; `p` itself by `init`."""

    def make(init: str = "", **modules: str) -> Sources:
        package = tmp_path / "p"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(init)
        for name, text in modules.items():
            (package / f"{name}.py").write_text(text)
        return Sources(tmp_path)

    return make


def digest_of(write: Write, text: str) -> str:
    found = write(a=text).find("p.a", "f")
    assert found is not None
    return digest(found)


@pytest.mark.parametrize(
    "text",
    [
        "def f(): ...",
        "async def f(): ...",
        "class f: ...",
        "f = 1",
        "f: int",
        "if x:\n    pass\nelse:\n    f = 1",
        "try:\n    import no_such\nexcept ImportError:\n    f = None",
        "import no_such as f",
        "from no_such import f",
        "f, g = 1, 2",
    ],
)
def test_a_name_is_found_however_it_is_made(write: Write, text: str) -> None:
    assert write(a=text).find("p.a", "f") is not None


@pytest.mark.parametrize("text", ["", "def g(): f = 1", "g.f = 1", "from .b import f"])
def test_a_name_that_is_not_made(write: Write, text: str) -> None:
    assert write(a=text, b="").find("p.a", "f") is None


def test_imports_are_followed(write: Write) -> None:
    sources = write(
        init="from .a import f as g", a="from p.b import h as f", b="from .c import *\nh = 1"
    )
    found = sources.find("p", "g")
    assert found is not None
    assert found.module == "p.b"


def test_imports_in_a_circle_end(write: Write) -> None:
    assert write(a="from p.b import f", b="from p.a import f").find("p.a", "f") is None


def test_a_submodule_is_found(write: Write) -> None:
    assert write(a="").find("p", "a") is not None
    assert write(a="").find("p", "no_such") is None


def test_members_are_found_in_bases_in_other_modules(write: Write) -> None:
    sources = write(
        a="from p.b import Base\nclass A(Base[int]):\n    def own(self): ...",
        b="class Base(Generic[T]):\n    x: int = 1\n    def f(self, y):\n        self.z = y",
    )
    for name in ("own", "x", "f"):
        assert sources.member("p.a", "A", name) is not None
    assert sources.member("p.a", "A", "no_such") is None
    assert sources.member("p.a", "NoSuch", "f") is None
    assert sources.stored_on_self("p.a", "A") == {"z"}


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("def f(a, /, b, *, c=1): ...", {"a", "b", "c"}),
        ("def f(a, **rest): ...", None),
        ("class f:\n    def __init__(self, a): ...", {"self", "a"}),
        ("class B:\n    a: int\nclass f(B):\n    b: int = 0", {"a", "b"}),
        ("f = 1", None),
    ],
)
def test_parameters(write: Write, text: str, parameters: set[str] | None) -> None:
    sources = write(a=text)
    found = sources.find("p.a", "f")
    assert found is not None
    assert parameters_of(found, sources.classes("p.a", "f")) == parameters


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x + 1",
        'def f(x: int) -> int:\n    """It adds."""\n    # One.\n    return (x\n        + 1)',
    ],
)
def test_what_does_not_change_a_digest(write: Write, text: str) -> None:
    assert digest_of(write, text) == digest_of(write, "def f(x): return x + 1")


@pytest.mark.parametrize(
    "text",
    [
        "def f(x): return x + 2",
        "def f(x, y): return x + 1",
        "def f(x=0): return x + 1",
        "def f(x): return x - 1",
        "@cache\ndef f(x): return x + 1",
        "async def f(x): return x + 1",
    ],
)
def test_what_changes_a_digest(write: Write, text: str) -> None:
    assert digest_of(write, text) != digest_of(write, "def f(x): return x + 1")


def test_a_source_to_read_is_without_docstrings(write: Write) -> None:
    found = write(a='def f(x):\n    """Why."""').find("p.a", "f")
    assert found is not None
    assert source_of(found) == ["def f(x):", "    pass"]
