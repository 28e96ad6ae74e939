"""One instance of the pool: a Ray actor with an engine and, beside it, its llumlet.

Threads of the process: the engine's loop (``run``) and those of its sockets, the llumlet's
asyncio loop with the migrator, and one that gives signs of life. Everything that touches the
engine's state is a closure on the engine's loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from dataclasses import dataclass

import ray

from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.policy import VictimPolicy
from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.base import EngineSettings
from llumsched.engine.factory import build_engine
from llumsched.instance.cpu_affinity import OwnCores
from llumsched.instance.gpu_turn import gpu_turn
from llumsched.instance.heartbeat import start_beating
from llumsched.instance.llumlet import Llumlet
from llumsched.instance.report_pace import IDLE_REPORT_INTERVAL_S
from llumsched.instance.signals import act_on
from llumsched.logs import LogOptions, set_up
from llumsched.wire.keys import PoolKeys

logger = logging.getLogger(__name__)

# The calls that are answered meanwhile. A class with a coroutine is an asyncio actor to Ray, whose
# other calls share one thread, which `run` holds.
WHILE_SERVING = "while serving"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePlan:
    """Everything an instance has to be told. ``keys`` are the pool's; ``host`` is the address its
    sockets bind to, without one that of its machine in the Ray cluster.
    ``reports_prefix_blocks`` needs an engine that records KV events. ``launch_id`` is the
    scheduler's order that it answers, if any. ``num_cores`` are for it alone, if they are free;
    0 lets it run on all. ``idle_report_interval_s`` is between two load reports while nothing is
    here. With ``shares_gpu`` it boots when no other instance of its GPU does."""

    instance_id: str
    engine: EngineSettings
    keys: PoolKeys
    scheduler_endpoint: str
    heartbeat_endpoint: str
    host: str | None
    victim: VictimPolicy
    migration: MigrationOptions
    transfer: TransferOptions
    logs: LogOptions
    reports_prefix_blocks: bool = False
    launch_id: str | None = None
    num_cores: int = 0
    idle_report_interval_s: float = IDLE_REPORT_INTERVAL_S
    shares_gpu: bool = False


class Instance:
    """The actor's class; made a Ray actor by ``llumsched.pool.pool``.

    ``__init__`` returns when the model is loaded. ``run`` serves until ``stop``; its end is the
    end of the instance, whatever the reason.
    """

    def __init__(self, plan: InstancePlan) -> None:
        self._plan = plan
        set_up(plan.instance_id, plan.logs)
        with gpu_turn(os.environ) if plan.shares_gpu else contextlib.nullcontext():
            logger.info("Loads the model")
            self._engine = build_engine(
                plan.engine,
                instance_id=plan.instance_id,
                keys=plan.keys,
                reports_prefix_blocks=plan.reports_prefix_blocks,
            )
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._llumlet: Llumlet | None = None
        self._llumlet_thread = threading.Thread(
            target=lambda: asyncio.run(self._run_llumlet()), name="llumlet", daemon=True
        )
        # Whoever takes the machine away tells its processes so.
        act_on(signal.SIGTERM, self._leave)

    def wait_for_init(self) -> int:
        """The number of KV blocks; answered once the engine is built."""
        return self._engine.spec().num_total_blocks

    def whereabouts(self) -> tuple[str, str, int]:
        """Ray's id of its machine, that one's address in the cluster, and the id of its process."""
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id, ray.util.get_node_ip_address(), os.getpid()

    def _leave(self) -> None:
        self._ready.wait()
        assert self._llumlet is not None
        self._llumlet.leave()

    def fingerprint(self) -> str:
        """Fingerprint that must be equal on all instances of a pool."""
        return self._engine.migration.fingerprint()

    def run(self) -> None:
        """Serve until ``stop``; raises what the engine died of."""
        plan = self._plan
        cores = None
        if plan.num_cores:
            cores = OwnCores(plan.num_cores)
            cores.bind()
        self._llumlet_thread.start()
        self._ready.wait()
        start_beating(
            plan.heartbeat_endpoint, plan.engine.engine_index, plan.keys, self._engine.ping
        )
        try:
            self._engine.run()
        except SystemExit:
            if not self._stopping.is_set():
                raise RuntimeError("the engine's loop ended by itself") from None
        finally:
            self._engine.close()
            if cores is not None:
                cores.release()

    def connect_frontend(self, client_index: int, input_address: str, output_address: str) -> None:
        """Serve a frontend that has joined; before ``run``, or ``WHILE_SERVING``."""
        self._engine.connect_frontend(client_index, input_address, output_address)

    @ray.method(concurrency_group=WHILE_SERVING)
    def abort_client(self, client_index: int) -> list[str]:
        """End every request of a frontend that is gone; which they were, once it is done."""
        # First, so that what it had sent is among them.
        self._engine.disconnect_frontend(client_index)
        return self._engine.call(lambda: self._engine.abort_client(client_index)).result()

    @ray.method(concurrency_group=WHILE_SERVING)
    def leave(self) -> None:
        """As SIGTERM to its process: have it drained. For one that serves."""
        self._leave()

    @ray.method(concurrency_group=WHILE_SERVING)
    def stop(self) -> None:
        """Ask the engine to end; ``run`` returns soon after."""
        self._stopping.set()
        self._engine.request_shutdown()

    async def _run_llumlet(self) -> None:
        plan = self._plan
        self._llumlet = llumlet = Llumlet(
            engine=self._engine,
            instance_id=plan.instance_id,
            victim=plan.victim,
            scheduler_endpoint=plan.scheduler_endpoint,
            keys=plan.keys,
            host=plan.host or ray.util.get_node_ip_address(),
            options=plan.migration,
            transfer=plan.transfer,
            launch_id=plan.launch_id,
            idle_report_interval_s=plan.idle_report_interval_s,
        )
        self._ready.set()
        try:
            await llumlet.run()
        except Exception:
            # Nobody would know the load of this instance, nor could empty it: its requests go on
            # elsewhere.
            logger.exception("The llumlet of %s ended, and the instance with it", plan.instance_id)
            os._exit(1)
