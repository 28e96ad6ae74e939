"""Faults that keep a pool from starting, played without a process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import ray

from llumsched.engine.compatibility import Compatibility, fingerprint_of
from llumsched.pool import pool as launch
from llumsched.pool.instance_actor import (
    InstanceResources,
    JoinedAddresses,
    PoolCompatibility,
    forwarded,
)
from llumsched.pool.instance_process import NodeWatches
from llumsched.pool.pool import Pool
from llumsched.pool.ray_cluster import LaunchError
from llumsched.wire.keys import PoolKeys
from tests.engine.fingerprints import HERE


class Booted:
    """An instance that has loaded its model."""

    def __init__(
        self,
        plan: Any,
        _resources: InstanceResources,
        _watches: NodeWatches,
        _joined: JoinedAddresses,
    ) -> None:
        self.instance_id = plan.instance_id
        self.group = SimpleNamespace(ready=lambda: "placed")
        self.booted = plan.instance_id
        self.actor = SimpleNamespace(fingerprint=SimpleNamespace(remote=lambda: plan.fingerprint))
        self.has_served = False

    def boot_failure(self) -> str:
        return ""

    def serve(self) -> None:
        self.has_served = True


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Ray's answers are there at once, and are what was asked for."""
    monkeypatch.setattr(launch, "InstanceActor", Booted)
    monkeypatch.setattr(ray, "wait", lambda found, **_: (found, []))
    monkeypatch.setattr(ray, "get", lambda found, **_: found)
    monkeypatch.setattr(launch, "this_node", lambda: "node:10.0.0.1")
    return Pool(
        ray_address=None,
        num_instances=3,
        planned_instances=3,
        keys=PoolKeys.generate(),
        progress=lambda _: None,
    )


def start(pool: Pool, *kinds: Compatibility) -> None:
    def plan(index: int, _launch_id: str | None) -> Any:
        return SimpleNamespace(
            instance_id=f"instance-{index}", fingerprint=fingerprint_of(kinds[index])
        )

    pool.start_instances(plan, InstanceResources(num_cpus=1, num_gpus=0), timeout_s=1.0)


def test_instances_that_are_alike_serve(pool: Pool) -> None:
    start(pool, HERE, HERE, HERE)
    assert [actor.has_served for actor in pool._actors.values()] == [True] * 3  # type: ignore[attr-defined]


def test_a_pool_with_one_of_another_kind_does_not_start(pool: Pool) -> None:
    """None serves, and the refusal names the two, what differs, and what to do."""
    odd = msgspec.structs.replace(HERE, dtype="bfloat16", tensor_parallel=2)
    with pytest.raises(LaunchError) as refusal:
        start(pool, HERE, HERE, odd)
    assert str(refusal.value) == (
        "Instances instance-0 and instance-2 cannot exchange requests: dtype is 'float32' here and "
        "'bfloat16' there, tensor_parallel is 1 here and 2 there (here: instance-0). Give every "
        "instance the same model, flags and vLLM."
    )
    assert not any(actor.has_served for actor in pool._actors.values())  # type: ignore[attr-defined]


def test_a_pool_may_start_with_no_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "this_node", lambda: "node:10.0.0.1")
    pool = Pool(
        ray_address=None,
        num_instances=0,
        planned_instances=2,
        keys=PoolKeys.generate(),
        progress=lambda _: None,
    )
    start(pool)
    assert not pool._actors


def test_the_first_instance_says_what_the_others_must_be_like() -> None:
    like = PoolCompatibility()
    assert not like.differences(fingerprint_of(HERE))
    assert not like.differences(fingerprint_of(HERE))
    other = fingerprint_of(msgspec.structs.replace(HERE, dtype="bfloat16"))
    assert "dtype" in like.differences(other)


def test_instances_elsewhere_get_the_settings_of_their_libraries() -> None:
    """And neither a secret of the frontend's nor the number of its GPU."""
    settings = {
        "NCCL_DEBUG": "INFO",
        "CUDA_LAUNCH_BLOCKING": "1",
        "TRITON_CACHE_DIR": "/a",
        "TORCHINDUCTOR_CACHE_DIR": "/b",
        "TORCH_LOGS": "all",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "FLASHINFER_WORKSPACE_BASE": "/c",
        "VLLM_BATCH_INVARIANT": "1",
        "HF_HOME": "/d",
    }
    others = {"VLLM_API_KEY": "secret", "CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin", "HOME": "/"}
    assert forwarded(settings | others) == settings


def test_a_pool_that_finds_too_few_gpus_says_that_they_can_be_shared(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InstanceResources, "bundle", lambda _self: {"CPU": 1, "GPU": 1})
    monkeypatch.setattr(ray, "wait", lambda found, **_: (found[:1], found[1:]))
    monkeypatch.setattr(launch, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(LaunchError, match=r"has room for 1 of 3 .*--gpus-per-instance 0\.5"):
        pool.start_instances(
            lambda index, _: SimpleNamespace(instance_id=f"instance-{index}"),  # type: ignore[arg-type,return-value]
            InstanceResources(num_cpus=1, num_gpus=1),
            timeout_s=1.0,
        )
