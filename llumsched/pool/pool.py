"""Starting and ending the pool: Ray, the global scheduler, the instances.

``Pool`` owns every process it starts. It attaches to a running Ray cluster or starts a local
one, and ends a local one with itself. Once the first instances serve, its supervisor looks after
them: it replaces those that die, and starts and ends others as it is told.

All processes run on this machine, also in a cluster of several, and their sockets are bound to
loopback; unless instances may be on any node, and then all sockets to the addresses that their
machines have in the cluster. The global scheduler is beside the frontend in any case.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray

from llumsched.config import Config
from llumsched.engine.compatibility import differences_in_pool
from llumsched.instance.actor import InstancePlan
from llumsched.logs import FailureLog, LogOptions, counted
from llumsched.pool.frontend_cleanup import FrontendLoss
from llumsched.pool.heartbeat_listener import HeartbeatListener
from llumsched.pool.instance_actor import (
    A_SHARE,
    InstanceActor,
    InstanceResources,
    JoinedAddresses,
    PoolCompatibility,
    this_node,
)
from llumsched.pool.instance_process import NodeWatches
from llumsched.pool.instance_supervisor import InstanceSupervisor
from llumsched.pool.node_drain import LOOK_INTERVAL_S, DrainingMachines
from llumsched.pool.orphans import OrphanWatch
from llumsched.pool.ray_cluster import LaunchError, cluster_resources, in_words, start_ray
from llumsched.pool.scheduler_watch import WATCH_TICK_S, SchedulerWatch
from llumsched.scheduler.actor import ACTOR_NAME, SchedulerActor
from llumsched.wire.keys import Gate, PoolKeys
from llumsched.wire.names import frontend_id

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# Whoever may add machines to a cluster takes longer.
PLACEMENT_TIMEOUT_S = 30.0
# While instances boot.
PROGRESS_INTERVAL_S = 10.0
STOP_TIMEOUT_S = 1.5
END_TIMEOUT_S = 1.0
TELL_TIMEOUT_S = 0.5


class Pool:
    """The running processes. Use as a context manager: leaving it ends all of them.

    Args:
        num_instances: how many are started at first; there may be none.
        planned_instances: so many may come to run, and a local Ray has room for them.
        keys: with which its processes prove themselves to each other.
        any_node: whether instances may be on other machines of the Ray cluster.
        progress: called with one sentence at each step, for a person to read.

    ``metrics_folder`` has the files in which scheduler and frontends keep their counts.
    """

    def __init__(
        self,
        *,
        ray_address: str | None,
        num_instances: int,
        planned_instances: int,
        keys: PoolKeys,
        progress: Callable[[str], None],
        any_node: bool = False,
    ) -> None:
        self._progress = progress
        self._failures = FailureLog(logger)
        self.metrics_folder = Path()
        self.keys = keys
        self._num_instances = num_instances
        self._planned_instances = planned_instances
        self._any_node = any_node
        self._likeness = PoolCompatibility()
        self._watches = NodeWatches()
        self._joined = JoinedAddresses()
        self._ray_address = ray_address
        self._actors: dict[int, InstanceActor] = {}
        self._controller: Any = None
        self._owns_ray = False
        self._threads: list[threading.Thread] = []
        self._orphans = OrphanWatch()
        self._telling: dict[str, Any] = {}
        self._stopping = threading.Event()
        self._ending = threading.Event()
        self._heartbeats: HeartbeatListener | None = None
        self.heartbeat_endpoint = ""
        self.scheduler_endpoint = ""
        self.instances_host: str | None = LOOPBACK

    def __enter__(self) -> Pool:
        self.metrics_folder = Path(tempfile.mkdtemp(prefix="llumsched-metrics-"))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def connect(self) -> str:
        """Start Ray, if need be.

        Returns:
            the address that the sockets of this machine bind to.
        """
        started_s = time.monotonic()
        self._orphans.start()
        self._owns_ray = start_ray(
            self._ray_address, num_cpus=max(os.cpu_count() or 1, self._planned_instances + 1)
        )
        how = "started a local Ray" if self._owns_ray else "attached to the Ray cluster"
        self._progress(f"{how} in {time.monotonic() - started_s:.1f} s")
        if self._owns_ray or not self._any_node:
            return LOOPBACK
        self.instances_host = None
        address: str = ray.util.get_node_ip_address()
        return address

    @property
    def can_be_joined(self) -> bool:
        """True if frontends may join: a Ray of its own is known to nobody else."""
        return not self._owns_ray

    @property
    def loopback_of(self) -> str | None:
        """Ray's id of this machine if all processes listen on its loopback."""
        if self.instances_host is None:
            return None
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def start_scheduler(
        self,
        config: Config,
        host: str,
        decision_log: Path | None,
        logs: LogOptions,
        invitation: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the global scheduler, which Ray starts again if it dies.

        Args:
            invitation: for frontends that want to join; see ``joining``.
        """
        actor = ray.remote(SchedulerActor).options(
            name=f"{ACTOR_NAME}-{os.getpid()}",
            num_cpus=0,
            max_concurrency=64,
            max_restarts=-1,
            resources={this_node(): A_SHARE},
        )
        self._controller = actor.remote(
            config,
            self.keys,
            host,
            _free_port(host),
            decision_log,
            logs,
            self.metrics_folder,
            invitation,
        )
        self._heartbeats = HeartbeatListener(host, self.keys)
        self.heartbeat_endpoint = self._heartbeats.endpoint
        self.scheduler_endpoint = ray.get(self._controller.endpoint.remote(), timeout=60)
        self._progress("the global scheduler is up")

    def start_instances(
        self,
        make_plan: Callable[[int, str | None], InstancePlan],
        resources: InstanceResources,
        *,
        timeout_s: float,
    ) -> None:
        """Start every instance and wait until each has loaded the model.

        Args:
            make_plan: what an instance is told, by its engine index and the order it answers.

        Raises:
            LaunchError: if one cannot be placed, fails, or takes longer than ``timeout_s``.
        """
        if not self._any_node:
            resources = replace(resources, node=this_node())
        self._make_plan, self._resources = make_plan, resources
        if not self._num_instances:
            self._progress("no instance is started before a request comes")
            return
        for index in range(self._num_instances):
            plan = make_plan(index, None)
            self._actors[index] = InstanceActor(plan, resources, self._watches, self._joined)
        self._await_places(timeout_s if self._any_node else PLACEMENT_TIMEOUT_S)
        started_s = said_s = time.monotonic()
        self._progress(f"booting {counted(self._num_instances, 'instance')} (each loads the model)")
        pending = {actor.booted: actor for actor in self._actors.values()}
        while pending:
            left_s = timeout_s - (time.monotonic() - started_s)
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, min(left_s, 5.0)))
            if not done:
                if left_s <= 0:
                    names = ", ".join(sorted(actor.instance_id for actor in pending.values()))
                    raise LaunchError(
                        f"Instances {names} were not ready within {timeout_s:.0f} s; "
                        "VLLM_ENGINE_READY_TIMEOUT_S sets this limit."
                    )
                if time.monotonic() - said_s >= PROGRESS_INTERVAL_S:
                    said_s = time.monotonic()
                    names = ", ".join(sorted(actor.instance_id for actor in pending.values()))
                    self._progress(f"waiting for {names}, {said_s - started_s:.0f} s so far")
                continue
            actor = pending.pop(done[0])
            failure = actor.boot_failure()
            if failure:
                raise LaunchError(f"Instance {actor.instance_id} failed to start: {failure}")
            self._progress(
                f"{actor.instance_id} is ready after {time.monotonic() - started_s:.0f} s: "
                f"{ray.get(actor.booted)} KV blocks"
            )
        self._check_alike()
        for actor in self._actors.values():
            actor.serve()

    def _await_places(self, timeout_s: float) -> None:
        groups = [actor.group for actor in self._actors.values()]
        ready = [group.ready() for group in groups]
        at_once_s = min(timeout_s, PLACEMENT_TIMEOUT_S)
        placed, waiting = ray.wait(ready, num_returns=len(ready), timeout=at_once_s)
        if waiting and timeout_s > at_once_s:
            self._progress(f"waiting for machines: {self._too_little(len(placed), len(groups))}")
            left_s = timeout_s - at_once_s
            placed, waiting = ray.wait(ready, num_returns=len(ready), timeout=left_s)
        if waiting:
            room = self._too_little(len(placed), len(groups))
            fix = "Lower --instances"
            if self._resources.num_gpus == 1:
                fix += ", or let instances share a GPU (--gpus-per-instance 0.5)"
            raise LaunchError(f"{room[0].upper()}{room[1:]}. {fix}.")

    def _too_little(self, num_placed: int, num_wanted: int) -> str:
        where = "" if self._any_node else " on this machine"
        return (
            f"the Ray cluster has room for {num_placed} of {num_wanted} instances: each needs "
            f"{in_words(self._resources.bundle())}{where}; the cluster has "
            f"{in_words(cluster_resources())} in all"
        )

    def _check_alike(self) -> None:
        actors = list(self._actors.values())
        found = ray.get([actor.actor.fingerprint.remote() for actor in actors], timeout=60)
        fingerprints = {a.instance_id: f for a, f in zip(actors, found, strict=True)}
        differing = differences_in_pool(fingerprints)
        if differing:
            raise LaunchError(differing)
        self._likeness.fingerprint = found[0]

    def supervise(self, listener: PoolListener, **limits: Any) -> InstanceSupervisor:
        """Look after instances and scheduler, on threads of their own, until ``stop``.

        Args:
            listener: hears of instances that are gone or will not come, on the supervisor's thread.
            limits: those of ``InstanceSupervisor``.
        """
        supervisor = InstanceSupervisor(_RayPool(self, listener), **limits)
        for index, actor in self._actors.items():
            supervisor.adopt(index, actor)
        self._run_thread(
            "supervise-instances", lambda: self._until_end(supervisor.tick, rest=supervisor.rest)
        )
        watch = SchedulerWatch(self._controller)
        self._run_thread(
            "watch-scheduler",
            lambda: self._until_end(lambda: watch.tick(WATCH_TICK_S), WATCH_TICK_S),
        )
        if self.instances_host is None:
            machines = DrainingMachines(lambda: list(self._actors.values()))
            self._run_thread(
                "watch-machines", lambda: self._until_end(machines.tick, LOOK_INTERVAL_S)
            )
        return supervisor

    def _until_end(
        self,
        tick: Callable[[], None],
        interval_s: float = 0.0,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        while not self._ending.wait(interval_s):
            rest()
            try:
                tick()
            except Exception:
                if not self._ending.is_set():
                    self._failures.failed("supervisor", "The supervisor failed, and goes on")

    def _run_thread(self, name: str, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop_supervising(self) -> None:
        """Whatever ends from now on is meant to."""
        self._ending.set()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def connect_frontend(self, client_index: int, input_address: str, output_address: str) -> None:
        """Have every instance, also those to come, serve a frontend that has joined."""
        addresses = input_address, output_address
        with self._joined.lock:
            self._joined.by_index[client_index] = addresses
            for actor in list(self._actors.values()):
                if actor.run is not None:
                    actor.connect_frontend(client_index, addresses)

    def forget_frontend(self, client_index: int) -> Callable[[], bool]:
        """Have everything ended that a dead frontend has left; as ``frontends.Host.forget``."""
        with self._joined.lock:
            self._joined.by_index.pop(client_index, None)
        serving = [actor.actor for actor in list(self._actors.values()) if actor.run is not None]
        name = frontend_id(client_index)
        return FrontendLoss(serving, self._controller, client_index, name).is_settled

    def start_one(self, engine_index: int, launch_id: str | None) -> InstanceActor:
        """Begin to start another instance, which must be like those before."""
        plan = self._make_plan(engine_index, launch_id)
        actor = InstanceActor(
            plan, self._resources, self._watches, self._joined, like=self._likeness
        )
        self._actors[engine_index] = actor
        return actor

    @property
    def heartbeat_gate(self) -> Gate:
        """Whom the listener for signs of life has turned away."""
        assert self._heartbeats is not None, "start the scheduler first"
        return self._heartbeats.gate

    def heard(self) -> Mapping[int, float]:
        """As ``HeartbeatListener.heard``."""
        return self._heartbeats.heard() if self._heartbeats is not None else {}

    def forget(self, engine_index: int) -> None:
        """An instance has ended."""
        self._actors.pop(engine_index, None)

    def tell_scheduler(self, instance_id: str, reason: str) -> bool:
        """Say that an instance is gone; whether the scheduler has heard it.

        One that has not at once is told no second time, but asked whether it has by now.
        """
        telling, timeout_s = self._telling.pop(instance_id, None), 0.0
        if telling is None:
            telling = self._controller.instance_lost.remote(instance_id, reason)
            timeout_s = TELL_TIMEOUT_S
        try:
            ray.get(telling, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            self._telling[instance_id] = telling
            return False
        except ray.exceptions.RayError:
            return False  # it died, and is told again
        return True

    def stop(self) -> None:
        """End every process that was started; safe to call twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        started_s = time.monotonic()
        # Known now, since those whose parent ends first are no longer found from here.
        processes = [
            process
            for process in psutil.Process().children(recursive=True)
            if process.pid != self._orphans.pid
        ]
        has_started = bool(processes) or ray.is_initialized()
        if ray.is_initialized():
            self.stop_supervising()
            self._stop_actors()
            ray.shutdown()
        if self._heartbeats is not None and not any(t.is_alive() for t in self._threads):
            self._heartbeats.close()
        _end(processes)
        self._orphans.close()
        if self.metrics_folder.name:
            shutil.rmtree(self.metrics_folder, ignore_errors=True)
        if has_started:
            self._progress(f"everything has ended, after {time.monotonic() - started_s:.1f} s")

    def _stop_actors(self) -> None:
        actors = list(self._actors.values())
        runs = [actor.run for actor in actors if actor.run is not None]
        if runs:
            # A chance to end by themselves; what has not by then is killed and leaves nothing
            # behind either, since the memory it shares has no name.
            with contextlib.suppress(ray.exceptions.RayError):
                for actor in actors:
                    actor.actor.stop.remote()
                ray.wait(runs, num_returns=len(runs), timeout=STOP_TIMEOUT_S)
        if self._controller is not None:
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                ray.get(self._controller.close.remote(), timeout=STOP_TIMEOUT_S)
            with contextlib.suppress(Exception):
                ray.kill(self._controller)
        for actor in actors:
            actor.kill()


class PoolListener(Protocol):
    """Listener to the ends of instances."""

    def gone(self, engine_index: int, *, expected: bool) -> None:
        """An instance is gone."""

    def refused(self, launch_id: str, reason: str) -> None:
        """An instance that the scheduler ordered will not come."""


class _RayPool:
    """Implements ``supervisor.Pool``."""

    def __init__(self, pool: Pool, listener: PoolListener) -> None:
        self._pool = pool
        self._listener = listener

    def start(self, engine_index: int, launch_id: str | None) -> InstanceActor:
        return self._pool.start_one(engine_index, launch_id)

    def heard(self) -> Mapping[int, float]:
        return self._pool.heard()

    def tell_scheduler(self, instance_id: str, reason: str) -> bool:
        return self._pool.tell_scheduler(instance_id, reason)

    def gone(self, engine_index: int, *, expected: bool) -> None:
        self._pool.forget(engine_index)
        self._listener.gone(engine_index, expected=expected)

    def refused(self, launch_id: str, reason: str) -> None:
        self._listener.refused(launch_id, reason)


def _end(processes: Sequence[psutil.Process]) -> None:
    """See that processes of ours have ended: Ray leaves some if it was interrupted while it
    started, and its agents notice only seconds later that the raylet is gone."""
    _, alive = psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            alive += process.children()  # started since
            process.kill()
    psutil.wait_procs(alive, timeout=END_TIMEOUT_S)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
