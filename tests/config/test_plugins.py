"""Policies are found by name or by `package.module:Class`, and what is wrong is said."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llumsched import plugins
from llumsched.commands import policies as policies_command
from llumsched.policies import BUILT_IN
from llumsched.reference import text_of

GOOD = '''
"""Test policies."""
from dataclasses import dataclass
from llumsched.core.params import param
from llumsched.core.policy import Placement, PolicyBundle

@dataclass
class Mine:
    """Sends everything to one place."""
    favourite: str = param("a", "Where to.")
    def dispatch(self, request, cluster):
        return Placement(instance_id=self.favourite, reason="mine")

class Plain:
    def dispatch(self, request, cluster):
        return None

class Both:
    def dispatch(self, request, cluster): ...
    def scale(self, cluster): ...

class Needy:
    def __init__(self, x): ...
    def dispatch(self, request, cluster): ...

NOT_A_CLASS = 3

def bundle():
    return PolicyBundle(name="x", dispatch=Mine())

def no_bundle():
    return 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_test_policies.py").write_text(GOOD)
    (tmp_path / "my_broken_policies.py").write_text("import not_there_at_all")
    (tmp_path / "my_raising_policies.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_test_policies"
    for name in ("my_test_policies", "my_broken_policies", "my_raising_policies"):
        sys.modules.pop(name, None)


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch, module: str) -> Iterator[None]:
    """`mine` and a broken one are installed by another distribution; so is a second `latency`."""
    group = plugins.ENTRY_POINT_GROUP
    entries = [
        importlib.metadata.EntryPoint("mine", f"{module}:Mine", group),
        importlib.metadata.EntryPoint("broken", "my_broken_policies:X", group),
        importlib.metadata.EntryPoint("latency", f"{module}:Mine", group),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    plugins._targets.cache_clear()
    yield
    monkeypatch.undo()
    plugins._targets.cache_clear()


def test_every_built_in_policy_loads_and_is_documented() -> None:
    policies = plugins.installed()
    assert {p.name for p in policies if p.source == "llumsched"} == set(BUILT_IN)
    for policy in policies:
        assert policy.doc.endswith("."), policy.name
        for param in policy.params:
            assert param.spec.doc.endswith("."), f"{policy.name}.{param.name}"


def test_every_shipped_bundle_cites_its_source_and_departures() -> None:
    newest = ("llumnix", "llm_d", "dualmap", "maps", "star", "dynaserve")
    for name in ("distserve", "splitwise", "tetriinfer", "memserve", "mooncake", "dynamo", *newest):
        doc = sys.modules[plugins.find(name).target.__module__].__doc__ or ""
        assert "Departure" in doc
        assert "Invariant" in doc


def test_a_class_is_named_by_module(module: str) -> None:
    policy = plugins.find(f"{module}:Mine")
    assert (policy.kind, policy.doc) == ("dispatch", "Sends everything to one place.")
    bundle = plugins.bundle_of(f"{module}:Mine")
    assert bundle.name == f"{module}:Mine"
    assert plugins.bundle_of(f"{module}:Plain").migration is None
    assert plugins.bundle_of(f"{module}:bundle").name == f"{module}:bundle"


def test_an_entry_point_is_installed_and_a_name_of_ours_is_not_taken(entry_points: None) -> None:
    assert plugins.find("mine").source == "an installed distribution"
    assert plugins.find("latency").kind == "bundle"
    assert "mine" in {p.name for p in plugins.installed()}


def test_a_broken_one_is_named_and_hides_no_other(
    entry_points: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "broken" not in {p.name for p in plugins.installed()}
    assert "No module named 'not_there_at_all'" in plugins.broken()["broken"]
    assert policies_command.run(argparse.Namespace(name=[], kind=None)) == 1
    captured = capsys.readouterr()
    assert "mine  (dispatch, from an installed distribution)" in captured.out
    assert "cannot be loaded: policy 'broken'" in captured.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_test_policies:Nothing", "module my_test_policies has no 'Nothing'"),
        ("my_broken_policies:X", "cannot import my_broken_policies (No module named"),
        ("my_raising_policies:X", "my_raising_policies fails when imported: ZeroDivisionError"),
        ("my_test_policies:Both", "must be a class with exactly one of the methods dispatch"),
        ("my_test_policies:NOT_A_CLASS", "must be a class with exactly one of the methods"),
        ("my_test_policies:Needy", "cannot be built: TypeError"),
        ("my_test_policies:no_bundle", "returned 3, not a PolicyBundle"),
    ],
)
def test_what_cannot_be_used_says_why(module: str, name: str, message: str) -> None:
    with pytest.raises(plugins.PluginError) as error:
        plugins.bundle_of(name)
    assert message in str(error.value)


def test_a_bundle_says_which_parts_it_has() -> None:
    lines = [line.strip() for line in text_of(plugins.find("latency")).splitlines()]
    (parts,) = (line for line in lines if line.startswith("parts: "))
    assert "dispatch freeness" in parts
    assert "migration " in parts
