"""The list of what is used of vLLM's internals: the installed version has all of it."""

from __future__ import annotations

import importlib.util

import pytest

from llumsched.engine.vllm import internals
from llumsched.engine.vllm.internals import (
    INTERNALS,
    SUPPORTED_VERSION,
    Internal,
    UnsupportedVersion,
    check_version,
    installed_version,
    what_moved,
)


def test_nothing_has_moved() -> None:
    assert what_moved() == []


@pytest.mark.parametrize(
    ("internal", "complaint"),
    [
        (Internal("vllm.no_such_module", "f", "test"), "No module named 'vllm.no_such_module'"),
        (Internal("vllm.v1.request:NoSuchClass", "f", "test"), "NoSuchClass"),
        (Internal("vllm.v1.request:Request", "no_such_method", "test"), "no longer there"),
        (
            Internal("vllm.v1.request:Request", "no_such_field", "test", on_instances=True),
            "no longer set",
        ),
        (
            Internal("vllm.v1.core.block_pool:BlockPool", "touch", "test", ("blocks", "no_such")),
            "no parameter no_such",
        ),
    ],
)
def test_what_has_moved_is_named(internal: Internal, complaint: str) -> None:
    (sentence,) = what_moved((internal,))
    assert complaint in sentence
    assert f"{internal.where}.{internal.name} (used to test)" in sentence


def test_each_is_listed_once() -> None:
    names = [(internal.where, internal.name) for internal in INTERNALS]
    assert len(names) == len(set(names))


def test_supported_version_is_installed() -> None:
    assert importlib.util.find_spec("vllm") is not None
    assert installed_version() == SUPPORTED_VERSION
    check_version()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "installed_version", lambda: "0.99.0")
    with pytest.raises(UnsupportedVersion) as refused:
        check_version()
    sentence = str(refused.value)
    assert "vLLM 0.99.0 is installed" in sentence
    assert f"vllm=={SUPPORTED_VERSION}" in sentence
    assert "--allow-other-vllm" in sentence


def test_another_version_may_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "installed_version", lambda: "0.99.0")
    check_version(allow_other=True)
