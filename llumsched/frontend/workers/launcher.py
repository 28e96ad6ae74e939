"""``llumsched serve``: this process starts everything else, and serves nothing itself.

    llumsched serve (this) --+-- frontend-0 ... frontend-K-1: vLLM's server, each a process
                             +-- Ray: the global scheduler and the instances

Only what is in a frontend ends with it: its clients' connections and their requests. Another takes
its place at the same port. So what looks after the instances is here, and there is nothing here
that a request could end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import signal
import socket
from dataclasses import replace

import vllm.envs as envs
from vllm.config import VllmConfig

from llumsched.frontend.http.app import CLOSING_TIMEOUT_S
from llumsched.frontend.options.arguments import ServeOptions
from llumsched.frontend.options.console import interrupt, on_signals, progress
from llumsched.frontend.options.instance_plan import limits_of, planner, resources_of
from llumsched.frontend.routing.engine_labels import EngineLabels
from llumsched.frontend.routing.instance_events import InstanceEventBridge
from llumsched.frontend.routing.scheduler_client import SchedulerClient
from llumsched.frontend.workers.door import FrontDoor
from llumsched.frontend.workers.invitation import invitation_of
from llumsched.frontend.workers.joined import JoinedFrontends
from llumsched.frontend.workers.launcher_server import LauncherServer
from llumsched.frontend.workers.messages import PoolStatus
from llumsched.frontend.workers.ports import FrontendPorts
from llumsched.frontend.workers.processes import WorkerProcesses
from llumsched.frontend.workers.worker import FrontendPlan
from llumsched.pool.frontend_supervisor import FrontendSupervisor
from llumsched.pool.instance_supervisor import TICK_S, InstanceSlotStatus, InstanceSupervisor
from llumsched.pool.joining import Invitation
from llumsched.pool.pool import Pool
from llumsched.pool.ray_cluster import LaunchError
from llumsched.wire.keys import PoolKeys
from llumsched.wire.names import engine_index

# A pool in which nothing happens is looked at this often; whatever does happen is told at once, and
# for so long afterwards every look is soon: a process that has closed its channel still has to end.
QUIET_TICK_S = 1.0
HURRY_S = 2.0
# Beyond what vLLM takes to close connections.
END_MARGIN_S = 2.0
INTERRUPTED = 130


async def serve(
    args: argparse.Namespace,
    options: ServeOptions,
    vllm_config: VllmConfig,
    listen_address: str,
    sock: socket.socket,
) -> int:
    """Serve until a signal comes; the process's exit status.

    Raises:
        LaunchError: if an instance or a frontend cannot be started.
    """
    on_signals(interrupt)
    keys = PoolKeys.generate()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(
            Pool(
                ray_address=options.ray_address,
                num_instances=options.num_instances,
                planned_instances=options.planned_instances,
                keys=keys,
                progress=progress,
                any_node=options.any_node,
            )
        )
        host = pool.connect()
        ports = stack.enter_context(FrontendPorts(host, options.num_frontends))
        hub = LauncherServer()
        joined = JoinedFrontends(hub, pool, options.num_frontends)
        door: FrontDoor | None = None
        invitation: Invitation | None = None
        if pool.can_be_joined:
            door = FrontDoor(host, keys, joined.admit)
            stack.callback(door.close)
            invitation = invitation_of(
                args,
                options,
                vllm_config,
                keys=keys,
                door=door.endpoint,
                loopback_of=pool.loopback_of,
            )
        async with WorkerProcesses(
            options.num_frontends,
            sock,
            hub,
            pool,
            closing_timeout_s=vllm_config.shutdown_timeout + CLOSING_TIMEOUT_S + END_MARGIN_S,
        ) as children:
            # They load their libraries while the instances boot, which may take its whole time.
            frontends = FrontendSupervisor(
                children, options.num_frontends, boot_timeout_s=2 * envs.VLLM_ENGINE_READY_TIMEOUT_S
            )
            pool.start_scheduler(
                options.config, host, options.decision_log, options.logs, invitation
            )
            on_signals(interrupt)  # Ray has put its own handler there
            pool.start_instances(
                planner(
                    options,
                    vllm_config,
                    ports.addresses(),
                    pool,
                    log_stats=not args.disable_log_stats,
                ),
                resources_of(vllm_config, options),
                timeout_s=envs.VLLM_ENGINE_READY_TIMEOUT_S,
            )
            stopping = asyncio.Event()
            loop = asyncio.get_running_loop()
            happened = Happened(loop)

            def stop() -> None:
                stopping.set()
                happened.tell()

            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop)
            link = SchedulerClient(
                pool.scheduler_endpoint, keys, least_loaded=lambda: None, frontend_id="launcher"
            )
            stack.callback(link.close)
            stack.callback(pool.stop_supervising)
            supervisor = pool.supervise(
                InstanceEventBridge(loop, hub, link),
                max_instances=options.most_instances,
                boot_timeout_s=envs.VLLM_ENGINE_READY_TIMEOUT_S,
                limits=limits_of(options),
            )
            supervisor.tell_of_changes(happened.tell)
            hub.tell_of_changes(happened.tell)
            link.supervise_with(supervisor)
            hub.supervise_with(supervisor)
            children.publish(
                lambda listener, loads: FrontendPlan(
                    args=args,
                    options=options,
                    vllm_config=vllm_config,
                    keys=keys,
                    host=host,
                    ports=tuple(ports.of(index) for index in range(options.num_frontends)),
                    scheduler_endpoint=pool.scheduler_endpoint,
                    listen_address=listen_address,
                    listener=listener,
                    loads=loads,
                    metrics_folder=pool.metrics_folder,
                )
            )
            status = await _look_after(
                frontends,
                joined,
                _Reporter(options, pool, supervisor, frontends, joined, hub, door),
                stopping,
                happened,
                f"{args.model} on {listen_address}",
            )
            progress("stopping")
    return status


async def _look_after(
    frontends: FrontendSupervisor,
    joined: JoinedFrontends,
    reporter: _Reporter,
    stopping: asyncio.Event,
    happened: Happened,
    what: str,
) -> int:
    """Until a signal comes; the process's exit status."""
    serving = False
    while not stopping.is_set():
        frontends.tick()
        joined.tick()
        reporter.report()
        statuses = frontends.describe()
        if not serving and all(status.state == "serving" for status in statuses):
            serving = True
            several = f", with {len(statuses)} frontends" if len(statuses) > 1 else ""
            progress(f"serving {what}{several}")
        for status in statuses:
            if not serving and status.num_deaths:
                raise LaunchError(
                    f"{status.frontend_id} failed to start: {status.last_failure}. What it said "
                    "is above."
                )
        is_quiet = all(status.state == "serving" for status in statuses) and joined.is_quiet
        await happened.rest(is_quiet=is_quiet)
    return 0 if serving else INTERRUPTED


class Happened:
    """When the launcher looks at its frontends again: at once when something has happened, often
    for a while afterwards, and else seldom.

    Args:
        loop: the one that rests.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._event = asyncio.Event()
        self._hurry_until_s = 0.0

    def tell(self) -> None:
        """Something has happened; safe from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody rests
            self._loop.call_soon_threadsafe(self._event.set)

    async def rest(self, *, is_quiet: bool) -> None:
        """Wait for the next look.

        Args:
            is_quiet: whether every frontend serves.
        """
        is_hurried = not is_quiet or self._loop.time() < self._hurry_until_s
        try:
            async with asyncio.timeout(TICK_S if is_hurried else QUIET_TICK_S):
                await self._event.wait()
        except TimeoutError:
            return
        self._event.clear()
        self._hurry_until_s = self._loop.time() + HURRY_S


class _Reporter:
    """Tells the frontends how everything is that this process has started."""

    def __init__(
        self,
        options: ServeOptions,
        pool: Pool,
        supervisor: InstanceSupervisor,
        frontends: FrontendSupervisor,
        joined: JoinedFrontends,
        hub: LauncherServer,
        door: FrontDoor | None,
    ) -> None:
        self._joined = joined
        self._gates = [pool.heartbeat_gate, *([door.gate] if door is not None else [])]
        self._pool = pool
        self._supervisor = supervisor
        self._frontends = frontends
        self._hub = hub
        self._max_instances = options.most_instances
        self._labels = EngineLabels(options.most_instances)

    def report(self) -> None:
        """Nothing, if nothing has changed."""
        berths = self._supervisor.describe()
        running = {engine_index(b.instance_id) for b in berths if b.state == "running"}
        known = set(self._labels.instances)
        for index in known - running:
            self._labels.give_back(index)
        for index in sorted(running - known):
            self._labels.take(index)
        self._hub.tell(
            PoolStatus(
                max_instances=self._max_instances,
                berths=tuple(_in_whole_seconds(berth) for berth in berths),
                frontends=(*self._frontends.describe(), *self._joined.describe()),
                labels=self._labels.by_instance,
                num_labels_used=self._labels.num_ever_taken,
                unproven={
                    **self._hub.unproven(),
                    "supervisor": sum(gate.num_unauthenticated for gate in self._gates),
                },
            )
        )


def _in_whole_seconds(berth: InstanceSlotStatus) -> InstanceSlotStatus:
    """Rounded, a time does not change at every look."""
    if berth.retry_in_s is None:
        return berth
    return replace(berth, retry_in_s=float(math.ceil(berth.retry_in_s)))
