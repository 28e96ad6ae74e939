"""The window of versions of vLLM: what is used is there, and what is not is said in a sentence."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llumsched.commands import serve
from llumsched.engine.vllm import version_check
from llumsched.engine.vllm.compat import (
    DROPPABLE,
    WINDOW,
    UnsupportedVersion,
    accepted,
    first_of,
    installed_folder,
    installed_version,
    minor_of,
    start_watchdog,
    version_in,
)
from llumsched.engine.vllm.internals import INTERNALS, Internal
from llumsched.engine.vllm.sources import Sources
from llumsched.engine.vllm.version_check import (
    check_version,
    fingerprint,
    own_imports,
    what_moved,
    why_unsupported,
)
from scripts.vllm_diff import fingerprinted_versions, read_fingerprint

MakeVllm = Callable[..., Path]


@pytest.fixture
def make_vllm(tmp_path: Path) -> MakeVllm:
    """A folder with a package `vllm` of a version, and of modules with these texts."""

    def make(version: str, **modules: str) -> Path:
        package = tmp_path / "vllm"
        package.mkdir()
        (package / "__init__.py").touch()
        line = f"__version__ = version = {version!r}\n"
        (package / "_version.py").write_text("__version__: str\n" + line)
        for name, text in modules.items():
            (package / f"{name}.py").write_text(text)
        return tmp_path

    return make


def test_the_installed_version_has_all_that_is_used() -> None:
    assert minor_of(installed_version()) in WINDOW
    assert what_moved(Sources(installed_folder())) == []
    check_version()


def test_the_installed_version_says_what_its_fingerprint_says() -> None:
    """Else somebody changed vLLM, or the list: `make vllm-diff VERSION=` (this version)."""
    version = installed_version()
    found = fingerprint(Sources(installed_folder()))
    kept = read_fingerprint(version)
    changed = sorted(
        label for label in found.keys() | kept.keys() if found.get(label) != kept.get(label)
    )
    assert changed == [], f"read them, then: make vllm-diff VERSION={version}"


def test_every_version_of_the_window_has_been_read() -> None:
    assert {minor_of(version) for version in fingerprinted_versions()} >= set(WINDOW)


def test_every_version_of_the_window_has_been_read_whole() -> None:
    """A list that has grown since leaves bodies of the other versions unread."""
    here = fingerprint(Sources(installed_folder())).keys()
    for version in fingerprinted_versions():
        later = {
            internal.label
            for internal in INTERNALS
            if internal.since in WINDOW
            and WINDOW.index(internal.since) > WINDOW.index(minor_of(version))
        }
        unread = sorted(here - read_fingerprint(version).keys() - later)
        assert unread == [], f"make vllm-diff VERSION={version}"


def test_each_internal_is_listed_once() -> None:
    labels = [internal.label for internal in INTERNALS]
    assert len(labels) == len(set(labels))


def test_all_that_is_used_of_scheduler_blocks_and_requests_is_listed() -> None:
    listed = {internal.name for internal in INTERNALS}
    objects = {"scheduler", "kv_manager", "kv_cache_manager", "block_pool", "request"}
    unlisted = {
        f"{path.name}: {owner}.{node.attr}"
        for path in Path(version_check.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Attribute)
        and (owner := getattr(node.value, "attr", getattr(node.value, "id", "")))
        and owner.removeprefix("_") in objects
        and node.attr not in listed
    }
    assert unlisted == set()


@pytest.mark.parametrize(
    ("internal", "complaint"),
    [
        (Internal("vllm.no_such_module", "f", "test"), "vllm.no_such_module.f (used to test)"),
        (Internal("vllm.v1.request:NoSuchClass", "f", "test"), "NoSuchClass.f (used to test)"),
        (Internal("vllm.v1.request:Request", "no_such", "test"), "Request.no_such (used to test)"),
        (
            Internal("vllm.v1.request:Request", "no_such", "test", on_instances=True),
            "Request.no_such (used to test)",
        ),
        (
            Internal("vllm.v1.core.block_pool:BlockPool", "touch", "test", ("blocks", "no_such")),
            "the parameter no_such of vllm.v1.core.block_pool:BlockPool.touch (used to test)",
        ),
        (
            Internal("vllm.v1.engine.utils", "EngineZmqAddresses", "test", ("inputs", "no_such")),
            "the parameter no_such of",
        ),
    ],
)
def test_what_has_moved_is_named(internal: Internal, complaint: str) -> None:
    (found,) = what_moved(Sources(installed_folder()), (internal,))
    assert complaint in found


def test_a_name_is_found_at_an_older_place(make_vllm: MakeVllm) -> None:
    sources = Sources(make_vllm("0.32.0", old="def f(x): ..."))
    assert what_moved(sources, (Internal("vllm.new", "f", "test", ("x",)),))
    internal = Internal("vllm.new", "f", "test", ("x",), or_where=("vllm.old",))
    assert what_moved(sources, (internal,)) == []


@pytest.mark.parametrize(("version", "is_missed"), [("0.31.0", False), ("0.32.1", True)])
def test_what_older_versions_do_without(make_vllm: MakeVllm, version: str, is_missed: bool) -> None:
    sources = Sources(make_vllm(version))
    assert bool(what_moved(sources, (Internal("vllm.a", "f", "test", since="0.32"),))) is is_missed


def test_a_parameter_that_can_be_left_out_is_not_missed(make_vllm: MakeVllm) -> None:
    sources = Sources(make_vllm("0.31.0", a="async def serve_http(app, **kwargs): ..."))
    assert what_moved(sources, (Internal("vllm.a", "serve_http", "test", ("peer_loads",)),)) == []


def test_imports_of_this_package_are_looked_for_too(make_vllm: MakeVllm) -> None:
    assert "vllm.v1.request.RequestStatus" in {internal.label for internal in own_imports()}
    moved = what_moved(Sources(make_vllm("0.32.0")))
    assert "vllm.v1.request.RequestStatus" in " ".join(moved)


# ---- versions that are not supported ----------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "modules", "complaint"),
    [
        ("0.30.1", {}, "vLLM 0.30.1 is installed, and llumsched works with vLLM 0.31, 0.32 and"),
        ("0.34.0", {}, "vLLM 0.34.0 is installed, and llumsched works with vLLM 0.31, 0.32 and"),
        ("0.33.1", {}, "but this one lacks vllm."),
    ],
)
def test_another_vllm_is_one_sentence(
    make_vllm: MakeVllm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
    modules: dict[str, str],
    complaint: str,
) -> None:
    folder = make_vllm(version, **modules)
    monkeypatch.setattr(version_check, "installed_folder", lambda: folder)
    with pytest.raises(UnsupportedVersion, match="Install vllm==") as refused:
        check_version()
    assert complaint in str(refused.value)
    assert "--allow-other-vllm" in str(refused.value)
    assert serve.main(["some/model"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert complaint in said

    check_version(allow_other=True)
    assert complaint in capsys.readouterr().err


FRONTEND = ["frontend", "--join", "head:6379"]
PROFILE = ["profile", "some/model", "--out", "x.yaml", "--accelerator", "some GPU"]


def imports_vllm(command: Path) -> bool:
    """True if a command imports a package that may import vLLM."""
    imported = (
        (node.module or "")
        for node in ast.walk(ast.parse(command.read_bytes()))
        if isinstance(node, ast.ImportFrom)
    )
    return any(name.split(".")[1:2] in (["engine"], ["frontend"]) for name in imported)


def test_every_command_that_imports_vllm_is_tested_for_it() -> None:
    folder = Path(serve.__file__).parent
    found = {p.stem for p in folder.glob("[a-z]*.py") if imports_vllm(p)}
    assert found == {"serve", "frontend", "profile"}


@pytest.mark.parametrize(
    "argv", [["serve", "some/model"], FRONTEND, PROFILE], ids=lambda argv: argv[0]
)
def test_it_is_said_before_anything_of_vllm_is_imported(
    make_vllm: MakeVllm, argv: list[str]
) -> None:
    folder = make_vllm("0.34.0")
    (folder / "vllm" / "__init__.py").write_text("raise ImportError('vllm was imported')")
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    program += f"from llumsched.cli import main; sys.exit(main({argv!r}))"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"llumsched {argv[0]}: vLLM 0.34.0 is installed, and")
    assert ended.stderr.count("\n") == 1


def test_a_version_without_a_number(tmp_path: Path) -> None:
    assert version_in(tmp_path) == "unknown"
    assert "vLLM unknown is installed" in str(why_unsupported(tmp_path))


# ---- what differs between versions ------------------------------------------------------------


def test_the_first_place_that_exists() -> None:
    assert first_of(("json.no_such", "json"), "dumps") is __import__("json").dumps
    with pytest.raises(ModuleNotFoundError, match=r"none of json\.no_such, no_such"):
        first_of(("json.no_such", "no_such"), "dumps")


def test_a_place_that_exists_and_cannot_be_imported_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_another.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        first_of(("needs_another", "json"), "dumps")


def test_the_watchdog_is_started_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, object]] = []
    module: Any = ModuleType("vllm.utils.watch_dog")
    module.start_watch_dog = lambda name, config, _logger: started.append((name, config))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    start_watchdog(SimpleNamespace(), "engine_0")
    assert started == [], "vLLM before 0.33"
    start_watchdog(SimpleNamespace(watchdog_config="as configured"), "engine_1")
    assert started == [("engine_1", "as configured")]


def test_only_what_can_be_left_out_is_left_out() -> None:
    def serve_http(app: object, **options: object) -> None: ...

    serve_http.__qualname__ = "serve_http"
    assert "peer_loads" in DROPPABLE["serve_http"]
    assert accepted(serve_http, peer_loads=1, other=2) == {"other": 2}

    def takes_it(peer_loads: int) -> None: ...

    takes_it.__qualname__ = "serve_http"
    assert accepted(takes_it, peer_loads=1, other=2) == {"peer_loads": 1, "other": 2}
