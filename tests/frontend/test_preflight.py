"""Faults that are found before anything starts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llumsched.frontend.options.arguments import UsageError
from llumsched.frontend.options.preflight import (
    DEFAULT_CPU_KV_NUM_BYTES,
    GIB,
    check_model,
    check_prefix_hashes,
    check_several_frontends,
    cpu_threads_per_worker,
    plan_cpu_memory,
    weight_num_bytes,
    why_not_served,
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """With 16 GiB of memory available."""
    memory = SimpleNamespace(available=16 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return monkeypatch


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with 1 GiB of weights (on paper)."""
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(GIB)
    return tmp_path


def make_config(model: Path, kv_cache_memory_bytes: int | None = None, num_workers: int = 1) -> Any:
    """The part of vLLM's configuration that is looked at."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=num_workers),
        model_config=SimpleNamespace(model=str(model)),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_cache_memory_bytes),
    )


def prefix_config(algorithm: str) -> Any:
    """The part of vLLM's configuration that is looked at."""
    return SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm))


def test_prefix_hashes_that_every_process_would_seed_for_itself() -> None:
    with pytest.raises(UsageError, match=r"xxhash.*sha256.*PYTHONHASHSEED"):
        check_prefix_hashes(prefix_config("xxhash"), {})
    check_prefix_hashes(prefix_config("xxhash"), {"PYTHONHASHSEED": "1"})
    check_prefix_hashes(prefix_config("sha256"), {})


def test_model_folder(model: Path) -> None:
    check_model(str(model))


@pytest.mark.parametrize("name", ["org/model", "model"])
def test_a_name_on_the_hub_is_vllms_to_find(name: str) -> None:
    check_model(name)


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "~/no/such/model", "a/b/c"])
def test_missing_model(path: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_model(path)
    assert f"no model at {path}" in str(refused.value)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        check_model(str(tmp_path))


def test_folder_with_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    check_model(str(tmp_path))


def test_weights_are_those_of_one_format(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"the same again")
    assert weight_num_bytes(str(model)) == GIB
    assert weight_num_bytes("org/model") == 0


@pytest.mark.usefixtures("machine")
def test_memory_is_shared_out(model: Path) -> None:
    config = make_config(model)
    assert plan_cpu_memory(config, 1, {}) == DEFAULT_CPU_KV_NUM_BYTES
    several = plan_cpu_memory(config, 5, {})
    assert several is not None
    assert GIB // 4 < several < DEFAULT_CPU_KV_NUM_BYTES


@pytest.mark.usefixtures("machine")
def test_memory_of_an_instance_is_shared_out_to_its_workers(model: Path) -> None:
    assert plan_cpu_memory(make_config(model, num_workers=4), 1, {}) == (
        DEFAULT_CPU_KV_NUM_BYTES // 4
    )
    # The flag is for each worker, as vLLM has it.
    with pytest.raises(UsageError, match=r"1\.0 of weights, 8\.0 of KV cache and 4\.5 of process"):
        plan_cpu_memory(make_config(model, 2 * GIB, num_workers=4), 2, {})


@pytest.mark.usefixtures("machine")
def test_memory_that_a_flag_names_is_left_alone(model: Path) -> None:
    assert plan_cpu_memory(make_config(model, GIB), 2, {}) is None
    assert plan_cpu_memory(make_config(model), 2, {"VLLM_CPU_KVCACHE_SPACE": "1"}) is None


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("num_instances", "kv", "environment"),
    [
        (50, None, {}),
        (2, 10 * GIB, {}),
        (2, None, {"VLLM_CPU_KVCACHE_SPACE": "10"}),
    ],
)
def test_too_little_memory(
    model: Path, num_instances: int, kv: int | None, environment: dict[str, str]
) -> None:
    with pytest.raises(UsageError) as refused:
        plan_cpu_memory(make_config(model, kv), num_instances, environment)
    sentence = str(refused.value)
    assert f"{num_instances} instances need about" in sentence
    assert "14.4 GiB are available" in sentence
    assert "Lower --instances" in sentence


@pytest.mark.parametrize(
    ("num_cores", "num_instances", "expected"), [(2, 2, 1), (1, 4, 1), (9, 2, 4), (17, 2, 8)]
)
def test_cores_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, num_instances: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(num_cores)))
    assert cpu_threads_per_worker(num_instances, {}) == expected


def test_threads_that_the_environment_names_are_left_alone() -> None:
    assert cpu_threads_per_worker(4, {"OMP_NUM_THREADS": "3"}) == 3


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_ENABLE_RESPONSES_API_STORE",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
    ],
)
def test_what_one_frontend_of_several_cannot_keep_for_the_others(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check_several_frontends(2)
    monkeypatch.setenv(name, "1")
    check_several_frontends(1)
    with pytest.raises(UsageError, match=name):
        check_several_frontends(2)


OFFLINE = (
    "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk"
    " and outgoing traffic has been disabled. To enable repo look-ups and downloads online, pass"
    " 'local_files_only=False' as input."
)


def test_a_model_that_may_not_be_downloaded_names_the_variable() -> None:
    said = why_not_served("some/model", "vllms/own", OSError(OFFLINE))
    assert said.startswith("some/model cannot be served: it is no folder, ")
    assert "HF_HUB_OFFLINE" in said
    assert "local_files_only" not in said


def test_a_model_that_nobody_named_is_said_to_be_vllms() -> None:
    said = why_not_served("vllms/own", "vllms/own", ValueError("one\n\n two\nthree\nfour"))
    assert said == (
        "vllms/own (vLLM's default, where no model is named) cannot be served: one two three"
    )
