"""Parts of a GPU: who gets how much of it, and where it cannot be divided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llumsched.core.transfer_options import TransferOptions
from llumsched.frontend import server
from llumsched.frontend.options import gpu_share, instance_plan
from llumsched.frontend.options.arguments import UsageError, parse
from llumsched.frontend.options.gpu_share import GIB, check_device, instances_per_gpu, share_gpus


def platform(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Have vLLM compute on "cuda" with 80 GiB, "cpu", or nothing that it knows."""
    found = SimpleNamespace(
        device_name=kind,
        is_cuda_alike=lambda: kind == "cuda",
        is_cpu=lambda: kind == "cpu",
        is_unspecified=lambda: kind == "",
        get_device_total_memory=lambda: 80 * GIB,
    )
    monkeypatch.setattr(gpu_share, "current_platform", found)
    monkeypatch.setattr(instance_plan, "current_platform", found)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch, "cuda")


def make_config(kv_gib: int | None = None, num_workers: int = 1) -> Any:
    """The part of vLLM's configuration that is looked at."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=num_workers),
        cache_config=SimpleNamespace(
            gpu_memory_utilization=0.9,
            kv_cache_memory_bytes=kv_gib * GIB if kv_gib is not None else None,
        ),
    )


def make_options(gpus_per_instance: float | None, transport: str = "auto") -> Any:
    return SimpleNamespace(
        gpus_per_instance=gpus_per_instance,
        planned_instances=2,
        config=SimpleNamespace(transfer_options=TransferOptions(transport=transport)),
    )


@pytest.mark.parametrize(
    ("part", "num_instances"), [(1, 1), (0.6, 1), (0.5, 2), (0.34, 2), (0.333333, 3), (0.1, 10)]
)
def test_instances_of_a_gpu(part: float, num_instances: int) -> None:
    assert instances_per_gpu(part) == num_instances


@pytest.mark.parametrize(("part", "share"), [(None, 0.9), (1, 0.9), (0.5, 0.45), (0.25, 0.225)])
def test_the_memory_is_divided(part: float | None, share: float) -> None:
    config, options = make_config(), make_options(part)
    share_gpus(config, options)
    assert config.cache_config.gpu_memory_utilization == pytest.approx(share)
    assert config.cache_config.kv_cache_memory_bytes is None
    assert instance_plan.resources_of(config, options).bundle() == {"CPU": 1, "GPU": part or 1}


def test_kv_bytes_are_those_of_one_instance() -> None:
    config = make_config(kv_gib=30)
    share_gpus(config, make_options(0.5))
    assert config.cache_config.kv_cache_memory_bytes == 30 * GIB
    # At the start vLLM wants so much to be free, whatever is named for the KV cache.
    assert config.cache_config.gpu_memory_utilization == pytest.approx(0.45)


def test_workers_have_a_gpu_each() -> None:
    config, options = make_config(num_workers=4), make_options(None)
    share_gpus(config, options)
    assert instance_plan.resources_of(config, options).num_gpus == 4
    share_gpus(config, make_options(4))


@pytest.mark.parametrize(
    ("config", "options", "complaint"),
    [
        (make_config(num_workers=2), make_options(0.5), "a GPU for each of its workers, and this"),
        (make_config(), make_options(2), "this one has 1; only one with a single worker"),
        (make_config(), make_options(0.5, "nccl"), "NCCL has no transport between two processes"),
        (
            make_config(kv_gib=41),
            make_options(0.5),
            "2 instances with 41.0 GiB of KV cache each do",
        ),
    ],
)
def test_what_cannot_be_divided(config: Any, options: Any, complaint: str) -> None:
    with pytest.raises(UsageError) as refused:
        share_gpus(config, options)
    assert complaint in str(refused.value)
    assert str(refused.value).startswith("--gpus-per-instance ")


def test_cpus_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch, "cpu")
    share_gpus(make_config(), make_options(None))
    with pytest.raises(UsageError, match="only a GPU is divided, and vLLM computes on cpu here"):
        share_gpus(make_config(), make_options(0.5))


def test_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told so in one line, and before vLLM's parser is made, which would fail."""
    check_device()
    platform(monkeypatch, "")
    monkeypatch.setattr(server, "parse", lambda _: pytest.fail("parsed"))
    assert server.main(["m/m"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llumsched serve: This machine has no GPU that vLLM can use, and")
    assert said.count("\n") == 1


def test_the_flag() -> None:
    assert parse(["m/m"])[1].gpus_per_instance is None
    assert parse(["m/m", "--gpus-per-instance", "0.5"])[1].gpus_per_instance == 0.5
    for bad in ("0", "-1", "nan"):
        with pytest.raises(UsageError, match=r"such as 0\.5"):
            parse(["m/m", "--gpus-per-instance", bad])
