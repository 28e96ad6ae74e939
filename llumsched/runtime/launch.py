"""Starting and ending the pool: Ray, the global scheduler, the instances.

``Pool`` owns every process it starts. It attaches to a running Ray cluster or starts a local
one, and ends a local one with itself. An instance is one actor in a placement group of one
bundle, so that it is placed whole or not at all.

All processes run on this machine, also in a cluster of several: the channels between them are
not authenticated yet, so they are bound to loopback.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llumsched.config import Config
from llumsched.engine.compatibility import differences_in_pool
from llumsched.runtime.controller import ACTOR_NAME, ControllerActor
from llumsched.runtime.instance import Instance, InstancePlan

logger = logging.getLogger(__name__)

# Environment variables that instances on other machines need as well.
FORWARDED_PREFIXES = ("VLLM_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "LLUMSCHED_", "TOKENIZERS_")
PLACEMENT_TIMEOUT_S = 30.0
A_SHARE = 0.001  # of a resource that only says where
STOP_TIMEOUT_S = 1.5
END_TIMEOUT_S = 1.0


class LaunchError(Exception):
    """The pool cannot be started; the message says why and what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceResources:
    """What Ray sets aside for one instance. ``environment`` is set in its process."""

    num_cpus: float
    num_gpus: float
    environment: Mapping[str, str] = field(default_factory=dict)


def start_ray(address: str | None, *, num_cpus: int) -> bool:
    """Attach to a Ray cluster, or start a local one.

    Args:
        address: as ``ray.init`` takes it; ``None`` attaches to the cluster that ``RAY_ADDRESS``
            or this machine's latest ``ray start`` names, and else starts one.
        num_cpus: logical CPUs of a cluster that is started.

    Returns:
        whether a local one was started, which ends with this process.

    Raises:
        LaunchError: if there is no cluster at ``address``.
    """
    # Ray's own warning about GPU masks does not concern a CPU actor.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts its workers at low priority, meant for machines that also serve people.
    os.environ.setdefault("RAY_worker_niceness", "0")
    quiet: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    named = address or os.environ.get("RAY_ADDRESS")
    found = named or _latest_ray_start()
    if found is not None:
        try:
            ray.init(address=found, **quiet)
            return False
        except ConnectionError as error:
            if named is not None:
                raise LaunchError(
                    f"There is no Ray cluster at {named}. Start one with 'ray start --head', or "
                    "leave --ray-address and RAY_ADDRESS out to have a local one started."
                ) from error
            logger.warning("The Ray cluster last started, at %s, is gone.", found)
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    return True


def _latest_ray_start() -> str | None:
    """The address that the last ``ray start`` on this machine wrote down, if any.

    Not Ray's "auto", which also finds the private clusters of other programs and would end
    with them.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    path = Path(folder) / "ray" / "ray_current_cluster"
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


class Pool:
    """The running processes. Use as a context manager: leaving it ends all of them.

    Args:
        progress: called with one sentence at each step, for a person to read.
    """

    def __init__(
        self, *, ray_address: str | None, num_instances: int, progress: Callable[[str], None]
    ) -> None:
        self._progress = progress
        self._num_instances = num_instances
        self._ray_address = ray_address
        self._groups: list[PlacementGroup] = []
        self._actors: dict[str, Any] = {}
        self._runs: dict[Any, str] = {}
        self._controller: Any = None
        self._owns_ray = False
        self._watching: threading.Thread | None = None
        self._stopping = threading.Event()
        self.scheduler_endpoint = ""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_scheduler(self, config: Config, host: str, decision_log: Path | None) -> None:
        """Start Ray, if need be, and the global scheduler."""
        started_s = time.monotonic()
        self._owns_ray = start_ray(
            self._ray_address, num_cpus=max(os.cpu_count() or 1, self._num_instances + 1)
        )
        how = "started a local Ray" if self._owns_ray else "attached to the Ray cluster"
        self._progress(f"{how} in {time.monotonic() - started_s:.1f} s")
        actor = ray.remote(ControllerActor).options(
            name=f"{ACTOR_NAME}-{os.getpid()}",
            num_cpus=0,
            max_concurrency=64,
            resources={_this_node(): A_SHARE},
        )
        self._controller = actor.remote(config, host, decision_log)
        self.scheduler_endpoint = ray.get(self._controller.endpoint.remote(), timeout=60)
        self._progress("the global scheduler is up")

    def start_instances(
        self, plans: Sequence[InstancePlan], resources: InstanceResources, *, timeout_s: float
    ) -> None:
        """Start every instance and wait until each has loaded the model.

        Raises:
            LaunchError: if one cannot be placed, fails, or takes longer than ``timeout_s``.
        """
        here = _this_node()
        bundle = {"CPU": resources.num_cpus, here: A_SHARE}
        if resources.num_gpus:
            bundle["GPU"] = resources.num_gpus
        self._groups = [placement_group([bundle]) for _ in plans]
        placed, waiting = ray.wait(
            [group.ready() for group in self._groups],
            num_returns=len(plans),
            timeout=PLACEMENT_TIMEOUT_S,
        )
        if waiting:
            raise LaunchError(
                f"The Ray cluster has room for {len(placed)} of {len(plans)} instances: each needs "
                f"{_in_words(bundle)} on this machine; the cluster has "
                f"{_in_words(_cluster_resources())} in all. Lower --instances."
            )
        environment = {
            name: value for name, value in os.environ.items() if name.startswith(FORWARDED_PREFIXES)
        } | dict(resources.environment)
        started_s = time.monotonic()
        pending = {}
        for plan, group in zip(plans, self._groups, strict=True):
            actor: Any = (
                ray.remote(Instance)
                .options(
                    num_cpus=resources.num_cpus,
                    num_gpus=resources.num_gpus,
                    max_concurrency=4,
                    runtime_env={"env_vars": environment},
                    scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
                )
                .remote(plan)
            )
            self._actors[plan.instance_id] = actor
            pending[actor.wait_for_init.remote()] = plan.instance_id
        self._progress(f"booting {len(plans)} instances (each loads the model)")
        while pending:
            left_s = timeout_s - (time.monotonic() - started_s)
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, min(left_s, 5.0)))
            if not done:
                if left_s <= 0:
                    raise LaunchError(
                        f"Instances {', '.join(sorted(pending.values()))} were not ready within "
                        f"{timeout_s:.0f} s; VLLM_ENGINE_READY_TIMEOUT_S sets this limit."
                    )
                continue
            instance_id = pending.pop(done[0])
            try:
                num_blocks = ray.get(done[0])
            except ray.exceptions.RayError as error:
                raise LaunchError(f"Instance {instance_id} failed to start: {_cause(error)}") from (
                    error
                )
            self._progress(
                f"{instance_id} is ready after {time.monotonic() - started_s:.0f} s: "
                f"{num_blocks} KV blocks"
            )
        self._check_alike()
        self._runs = {
            actor.run.remote(): instance_id for instance_id, actor in self._actors.items()
        }

    def _check_alike(self) -> None:
        fingerprints = dict(
            zip(
                self._actors,
                ray.get(
                    [actor.fingerprint.remote() for actor in self._actors.values()], timeout=60
                ),
                strict=True,
            )
        )
        differing = differences_in_pool(fingerprints)
        if differing:
            raise LaunchError(differing)

    def watch(self, on_lost: Callable[[str, str], None]) -> None:
        """Call ``on_lost(instance_id, reason)``, on a thread of its own, when one ends."""

        def watch() -> None:
            runs = dict(self._runs)
            while runs and not self._stopping.is_set():
                try:
                    done, _ = ray.wait(list(runs), num_returns=1, timeout=0.5)
                except Exception:
                    return  # Ray is going down
                for run in done:
                    instance_id = runs.pop(run)
                    if self._stopping.is_set():
                        return
                    reason = "it stopped"
                    try:
                        ray.get(run)
                    except Exception as error:
                        reason = _cause(error)
                    logger.error("Instance %s ended: %s", instance_id, reason)
                    self._controller.instance_lost.remote(instance_id, reason)
                    on_lost(instance_id, reason)

        self._watching = threading.Thread(target=watch, name="watch-instances", daemon=True)
        self._watching.start()

    def stop(self) -> None:
        """End every process that was started; safe to call twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        started_s = time.monotonic()
        # Known now, since those whose parent ends first are no longer found from here.
        processes = psutil.Process().children(recursive=True)
        has_started = bool(processes) or ray.is_initialized()
        if ray.is_initialized():
            self._stop_actors()
            ray.shutdown()
        _end(processes)
        if has_started:
            self._progress(f"everything has ended, after {time.monotonic() - started_s:.1f} s")

    def _stop_actors(self) -> None:
        if self._runs:
            # A chance to end by themselves; what has not by then is killed and leaves nothing
            # behind either, since the memory it shares has no name.
            with contextlib.suppress(ray.exceptions.RayError):
                for actor in self._actors.values():
                    actor.stop.remote()
                ray.wait(list(self._runs), num_returns=len(self._runs), timeout=STOP_TIMEOUT_S)
        if self._controller is not None:
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                ray.get(self._controller.close.remote(), timeout=STOP_TIMEOUT_S)
        for actor in (*self._actors.values(), self._controller):
            if actor is not None:
                with contextlib.suppress(Exception):
                    ray.kill(actor)
        for group in self._groups:
            with contextlib.suppress(Exception):
                remove_placement_group(group)
        if self._watching is not None:
            self._watching.join(timeout=1.0)


def _end(processes: Sequence[psutil.Process]) -> None:
    """See that processes of ours have ended: Ray leaves some if it was interrupted while it
    started, and its agents notice only seconds later that the raylet is gone."""
    _, alive = psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            alive += process.children()  # started since
            process.kill()
    psutil.wait_procs(alive, timeout=END_TIMEOUT_S)


def _this_node() -> str:
    """The resource that Ray gives to this machine alone."""
    return f"node:{ray.util.get_node_ip_address()}"


def _cluster_resources() -> Mapping[str, float]:
    resources: Mapping[str, float] = ray.cluster_resources()
    return resources


def _in_words(resources: Mapping[str, float]) -> str:
    named = {name: resources[name] for name in ("CPU", "GPU") if name in resources}
    return " and ".join(f"{amount:g} {name}" for name, amount in named.items()) or "nothing"


def _cause(error: BaseException) -> str:
    """The innermost message of a Ray error: what the instance itself said."""
    cause: BaseException = getattr(error, "cause", None) or error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__
