"""One instance as a Ray actor: placed, started, watched, killed.

Nothing here waits, so that one thread can look after all of them. An instance has a placement group
of one bundle, so that it is placed whole or not at all, and lets go of it when it is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llumsched.engine.compatibility import differences
from llumsched.instance.actor import WHILE_SERVING, Instance, InstancePlan
from llumsched.pool.instance_process import (
    InstanceProcess,
    LocalProcess,
    NodeWatches,
    RemoteProcess,
)
from llumsched.pool.process_activity import Work

# Environment variables that instances on other machines need as well.
FORWARDED_PREFIXES = (
    "CUBLAS_",
    "CUDA_",
    "FLASHINFER_",
    "HF_",
    "HUGGING_FACE_",
    "LLUMSCHED_",
    "NCCL_",
    "PYTORCH_",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
    "TRITON_",
    "UCX_",
    "VLLM_",
)
# Clients prove themselves to the frontend alone, and Ray shows this environment to its users. Which
# GPUs an instance has is for Ray to say.
NOT_FORWARDED = frozenset({"VLLM_API_KEY", "CUDA_VISIBLE_DEVICES"})
PID_TIMEOUT_S = 5.0
A_SHARE = 0.001  # of a resource that only says where
MAX_CAUSE_LENGTH = 300
# Ray's words: "Memory on the node (...) was 22.90GB / 24.00GB (0.954), which exceeds ..."
_MEMORY_USED = re.compile(r"was (?P<used>[\d.]+ ?[KMGT]i?B) / (?P<total>[\d.]+ ?[KMGT]i?B)")
NO_WORK = Work(cpu_s=0.0, is_ready=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceResources:
    """Resources that Ray sets aside for one instance. ``environment`` is set in its process.

    ``node`` is the resource of the machine that it must be on, if it must be on one.
    """

    num_cpus: float
    num_gpus: float
    environment: Mapping[str, str] = field(default_factory=dict)
    node: str | None = None

    def bundle(self) -> dict[str, float]:
        """Resources that the placement group asks for."""
        bundle = {"CPU": self.num_cpus}
        if self.node is not None:
            bundle[self.node] = A_SHARE
        if self.num_gpus:
            bundle["GPU"] = self.num_gpus
        return bundle


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Part of the server's environment that an instance gets, wherever it is."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(FORWARDED_PREFIXES) and name not in NOT_FORWARDED
    }


class PoolCompatibility:
    """Properties common to the instances of a pool: the first to boot says them for all."""

    def __init__(self) -> None:
        self.fingerprint: str | None = None

    def differences(self, fingerprint: str) -> str:
        """How an instance that has booted differs from them, in words; empty if it does not."""
        if self.fingerprint is None:
            self.fingerprint = fingerprint
        return differences(self.fingerprint, fingerprint)


class JoinedAddresses:
    """Where frontends that have joined listen, for requests and for outputs, by client index.

    ``lock`` is held by whoever changes them, and by whoever has an instance begin to serve.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_index: dict[int, tuple[str, str]] = {}


class InstanceActor:
    """Implements ``supervisor.RunningInstance``.

    Args:
        watches: those of the machines of the pool.
        joined: frontends that the plan does not name.
        like: what this instance must be like, if that is to be seen before it serves.
    """

    def __init__(
        self,
        plan: InstancePlan,
        resources: InstanceResources,
        watches: NodeWatches,
        joined: JoinedAddresses,
        like: PoolCompatibility | None = None,
    ) -> None:
        self._like = like
        self._watches = watches
        self._joined = joined
        self.node: str | None = None
        self.node_id: str | None = None
        self.instance_id = plan.instance_id
        self.group: PlacementGroup = placement_group([resources.bundle()])
        environment = forwarded(os.environ) | dict(resources.environment)
        remote: Any = ray.remote  # its types know no concurrency groups
        options = remote(concurrency_groups={WHILE_SERVING: 1})(Instance).options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            runtime_env={"env_vars": environment},
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=self.group),
        )
        self.actor: Any = options.remote(plan)
        self.booted: Any = self.actor.wait_for_init.remote()
        self.run: Any = None
        self._ended: Future[None] | None = None
        self._process: InstanceProcess | None = None

    def boot_failure(self) -> str | None:
        """``None`` while it boots, empty when it has, else why it will not."""
        if not _is_done(self.booted):
            return None
        try:
            ray.get(self.booted)
            self._find_process(ray.get(self.actor.whereabouts.remote(), timeout=PID_TIMEOUT_S))
        except ray.exceptions.GetTimeoutError:
            return None
        except (ray.exceptions.RayError, psutil.NoSuchProcess) as error:
            return cause(error)
        if self._like is None:
            return ""
        differing = self._like.differences(ray.get(self.actor.fingerprint.remote()))
        return f"it is not like the others: {differing}" if differing else ""

    def _find_process(self, whereabouts: tuple[str, str, int]) -> None:
        self.node_id, self.node, pid = whereabouts
        if self.node_id == ray.get_runtime_context().get_node_id():
            self._process = LocalProcess(pid)
        else:
            self._process = RemoteProcess(self._watches.of(self.node_id), pid)

    @property
    def pid(self) -> int | None:
        """Process id of the instance, once it has booted."""
        return self._process.pid if self._process is not None else None

    def serve(self) -> None:
        """Begin to serve; it has booted."""
        with self._joined.lock:
            for index, addresses in self._joined.by_index.items():
                # Before it serves: what comes before is answered first.
                self.actor.connect_frontend.remote(index, *addresses)
            self.run = self.actor.run.remote()
        self._ended = self.run.future()

    def connect_frontend(self, client_index: int, addresses: tuple[str, str]) -> None:
        """Have it serve a frontend that joins now; it serves."""
        connect = self.actor.connect_frontend.options(concurrency_group=WHILE_SERVING)
        connect.remote(client_index, *addresses)

    @property
    def serves(self) -> bool:
        """True if the instance has begun to serve."""
        return self.run is not None

    def leave(self) -> None:
        """Tell it that its machine goes; it serves."""
        self.actor.leave.remote()

    def end_reason(self) -> str | None:
        """``None`` while it serves, else why it ended."""
        if self._ended is None or not self._ended.done():
            return None
        try:
            ray.get(self.run)
        except ray.exceptions.RayError as error:
            return cause(error)
        return "it stopped"

    def tell_of_end(self, ended: Callable[[], None]) -> None:
        """Have this called, on a thread of Ray's, when one that serves has ended."""
        assert self._ended is not None, "it does not serve"
        self._ended.add_done_callback(lambda _: ended())

    def is_stopped(self) -> bool:
        """True if the process is held by the system, as by SIGSTOP."""
        return self._process is not None and self._process.is_stopped()

    def work(self) -> Work:
        """Work of the process so far."""
        return self._process.work() if self._process is not None else NO_WORK

    def has_descendants(self) -> bool:
        """True if the process has started others."""
        return self._process is not None and self._process.has_descendants()

    def descendants_work(self) -> Work:
        """Work of the descendants so far."""
        return self._process.descendants_work() if self._process is not None else NO_WORK

    def kill(self) -> None:
        """End its process at once, also one that hangs, and give back its place."""
        if self._process is not None:
            # Ray asks a process to end; one that was stopped would not hear it.
            self._process.kill()
        with contextlib.suppress(Exception):  # it, or Ray itself, is gone already
            ray.kill(self.actor)
        with contextlib.suppress(Exception):
            remove_placement_group(self.group)


def this_node() -> str:
    """The resource that Ray gives to this machine alone."""
    return f"node:{ray.util.get_node_ip_address()}"


def cause(error: BaseException) -> str:
    """Why an instance ended, in one line that begins with the cause.

    That is the innermost message of a Ray error: what the instance itself said.
    """
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        used = _MEMORY_USED.search(str(error))
        how_full = f", {used['used']} of {used['total']} in use" if used is not None else ""
        return f"out of memory: Ray ended it since its machine was nearly full{how_full}"
    if isinstance(error, ray.exceptions.NodeDiedError):
        return "its machine died"
    if isinstance(error, ray.exceptions.ActorDiedError) and not error.actor_init_failed:
        return "its process died"
    innermost: BaseException = getattr(error, "cause", None) or error.__cause__ or error
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    return _shortened(lines[-1]) if lines else type(innermost).__name__


def _shortened(line: str) -> str:
    """For the line of a log and of a table."""
    return line if len(line) <= MAX_CAUSE_LENGTH else f"{line[:MAX_CAUSE_LENGTH].rstrip()} ..."


def _is_done(reference: Any) -> bool:
    done, _ = ray.wait([reference], timeout=0)
    return bool(done)
