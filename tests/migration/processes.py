"""Instances that are processes of their own, so that the kernel can kill or stop one.

A process holds one real engine with its busy loop, and its migrator; the test is their frontend and
their scheduler, and hears of tokens as they come. A ``Fault`` waits in one of the processes until a
migration has come to a state, and happens before that process acts upon it.

What this does not know: what is right after a fault (``test_process_faults``).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import zmq.asyncio
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.utils import EngineZmqAddresses

from llumsched.core.migration.destination.record import ReservationOptions
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.vllm.core import EngineSettings
from llumsched.engine.vllm.migration import HAND_OVER_CALL_ID, MigrationAdapter
from llumsched.migration import link as peer_link
from llumsched.migration import migrator
from llumsched.migration.destination import IncomingMigration
from llumsched.migration.messages import PeerMessage, decode_peer
from llumsched.migration.migrator import Migrator
from llumsched.migration.source import OutgoingMigration
from llumsched.wire.control import OrderMigration, ReportMigration
from llumsched.wire.keys import PoolKeys
from tests.builders import engine_request
from tests.migration.pool import ENGINE_FLAGS, NUM_BLOCKS
from tests.migration.stepped import SteppedCore

PATIENCE_S = 120.0
POLL_S = 0.02

HURRIED = MigrationOptions(
    reserve_timeout_s=0.5,
    stage_timeout_s=0.5,
    suspend_timeout_s=0.5,
    final_stage_timeout_s=0.5,
    commit_timeout_s=0.3,
    query_interval_s=0.1,
)
PATIENT_RESERVATION = ReservationOptions(reservation_timeout_s=1.0, acknowledge_interval_s=0.1)
# Longer than every deadline of either side.
FAULT_S = 1.5


class Side(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class What(StrEnum):
    KILL_SOURCE = "the source is killed"
    KILL_DESTINATION = "the destination is killed"
    STOP_SOURCE = "the source stops for a while"
    STOP_DESTINATION = "the destination stops for a while"
    CUT_LINK = "the link is cut for a while"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """``what`` happens when the table of ``side`` is in ``state``; a signal hits ``pid``."""

    side: Side
    state: str
    what: What
    pid: int


@dataclass(slots=True)
class Stay:
    """Tokens that one instance has put out for the request, the first of them at ``first``."""

    first: int
    token_ids: list[int] = field(default_factory=list)
    is_finished: bool = False

    @property
    def positions(self) -> range:
        return range(self.first, self.first + len(self.token_ids))


# ---- in the process of an instance ----------------------------------------------------------


def run_instance(parent: Connection, model: str, name: str, keys: PoolKeys) -> None:
    """The main function of an instance's process; it ends when ``parent`` closes."""
    try:
        _Instance(parent, model, name, keys).serve()
    except EOFError:
        os._exit(0)  # engine and migrator have nothing to save


class _Instance:
    def __init__(self, parent: Connection, model: str, name: str, keys: PoolKeys) -> None:
        self._parent = parent
        self._keys = keys
        self._sending = threading.Lock()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        arguments = EngineArgs(model=model, **ENGINE_FLAGS)
        self._core = SteppedCore(
            EngineSettings(
                vllm_config=arguments.create_engine_config(),
                frontend_addresses=EngineZmqAddresses(inputs=["none"], outputs=["none"]),
                engine_index=0,
                log_stats=False,
            )
        )
        self._port = MigrationAdapter(self._core)
        self._core.observe(after_step=self._port.after_step, on_abort=self._port.on_abort)
        self._loop = asyncio.new_event_loop()
        self._cut_until_s = 0.0
        self._fault: Fault | None = None
        self._install_faults()
        for run in (self._loop.run_forever, self._core.run, self._pass_outputs_on):
            threading.Thread(target=run, daemon=True).start()
        self._migrator = self._on_loop(self._make_migrator(name))

    async def _make_migrator(self, name: str) -> Migrator:
        made = Migrator(
            instance_id=name,
            port=self._port,
            call=self._core.call,
            abort=lambda request_id: self._abort([request_id]),
            host="127.0.0.1",
            step_time_s=lambda: self._core.step_time_s,
            step_ahead=self._core.step_ahead,
            options=HURRIED,
            transfer=TransferOptions(),
            keys=self._keys,
        )
        made._incoming._options = PATIENT_RESERVATION
        return made

    def serve(self) -> None:
        self._tell("ready", self._migrator.endpoint)
        while True:
            command, *arguments = self._parent.recv()
            getattr(self, f"_{command}")(*arguments)

    def _tell(self, *message: Any) -> None:
        with self._sending:
            self._parent.send(message)

    def _on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def _pass_outputs_on(self) -> None:
        while True:
            _, outputs = self._core.output_queue.get()
            assert isinstance(outputs, EngineCoreOutputs)
            if outputs.utility_output is not None:
                assert outputs.utility_output.call_id == HAND_OVER_CALL_ID
                assert outputs.utility_output.result is not None
                request_id, _, num_tokens = outputs.utility_output.result.result
                self._tell("arrived", request_id, num_tokens)
            for output in outputs.outputs:
                is_finished = output.finish_reason is not None
                self._tell("tokens", output.request_id, output.new_token_ids, is_finished)

    # What the parent may ask for.

    def _submit(self, request: EngineCoreRequest) -> None:
        def add() -> None:
            self._core.add_request(*self._core.preprocess_add_request(request))

        self._core.call(add).result(PATIENCE_S)

    def _abort(self, request_ids: list[str]) -> None:
        self._core.call(lambda: self._core.abort_requests(request_ids))

    def _migrate(self, order: OrderMigration, options: MigrationOptions) -> None:
        async def migrate() -> None:
            self._migrator._options = options
            self._tell("report", await self._migrator.migrate(order, order.request_id))

        asyncio.run_coroutine_threadsafe(migrate(), self._loop)

    def _await_fault(self, fault: Fault) -> None:
        self._fault = fault
        self._tell("armed")

    def _peer_gone(self, name: str) -> None:
        self._loop.call_soon_threadsafe(self._migrator.peer_gone, name)

    def _describe(self) -> None:
        def describe() -> dict[str, Any]:
            pool = self._core.scheduler.kv_cache_manager.block_pool
            return {
                "requests": sorted(self._core.scheduler.requests),
                "exports": sorted(self._port._exports),
                "imports": sorted(self._port._imports),
                "used blocks": NUM_BLOCKS - 1 - pool.get_num_free_blocks(),
                "migrations": self._migrator.num_outgoing + self._migrator.num_incoming,
            }

        self._tell("described", self._core.call(describe).result(PATIENCE_S))

    # Faults.

    def _install_faults(self) -> None:
        """Every state that is entered with a command can be caught before it is carried out."""

        def caught(host: Any, side: Side) -> Callable[[Any, Any], None]:
            execute = host.execute

            def happen_first(this: Any, command: Any) -> None:
                self._happen(side, this.record.state)
                execute(this, command)

            return happen_first

        def decode(frame: Any) -> PeerMessage:
            if time.monotonic() < self._cut_until_s:
                raise msgspec.DecodeError("lost on the way")
            message: PeerMessage = decode_peer(frame)
            return message

        def unless_cut(send: Callable[..., Any]) -> Callable[..., Any]:
            async def send_or_lose(socket: Any, *arguments: Any, **keywords: Any) -> None:
                if time.monotonic() >= self._cut_until_s:
                    await send(socket, *arguments, **keywords)

            return send_or_lose

        changes: list[tuple[Any, str, Any]] = [
            (OutgoingMigration, "execute", caught(OutgoingMigration, Side.SOURCE)),
            (IncomingMigration, "execute", caught(IncomingMigration, Side.DESTINATION)),
            (peer_link, "decode_peer", decode),
            (migrator, "decode_peer", decode),
            (zmq.asyncio.Socket, "send", unless_cut(zmq.asyncio.Socket.send)),
            (zmq.asyncio.Socket, "send_multipart", unless_cut(zmq.asyncio.Socket.send_multipart)),
        ]
        for owner, name, changed in changes:
            setattr(owner, name, changed)

    def _happen(self, side: Side, state: str) -> None:
        fault = self._fault
        if fault is None or (fault.side, fault.state) != (side, state):
            return
        self._fault = None
        self._tell("happens")
        match fault.what:
            case What.CUT_LINK:
                self._cut_until_s = time.monotonic() + FAULT_S
            case What.KILL_SOURCE | What.KILL_DESTINATION:
                os.kill(fault.pid, signal.SIGKILL)
            case _:
                os.kill(fault.pid, signal.SIGSTOP)


# ---- in the process of the test -------------------------------------------------------------


class RemoteInstance:
    """An instance as the test sees it: what it was told, and what it has said so far."""

    def __init__(self, model: str, name: str, keys: PoolKeys) -> None:
        self.name = name
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # vLLM is imported once
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=run_instance, args=(theirs, model, name, keys), name=name, daemon=True
        )
        self.process.start()
        theirs.close()
        self.endpoint = ""
        self.stays: dict[str, Stay] = {}
        self.reports: list[ReportMigration] = []
        self.heard: set[str] = set()
        self.description: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def submit(self, request_id: str, prompt_token_ids: Sequence[int], num_tokens: int) -> None:
        self.stays[request_id] = Stay(0)
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        request = engine_request(
            request_id,
            prompt_token_ids=list(prompt_token_ids),
            sampling_params=sampling,
            arrival_time=time.time(),
            cache_salt=request_id,
            external_req_id=request_id,
        )
        self.ask("submit", request)

    def ask(self, *command: Any) -> None:
        self._connection.send(command)

    def listen(self) -> None:
        """Take in what the instance has said, which may be dead by now."""
        try:
            while self._connection.poll():
                self._take_in(*self._connection.recv())
        except (EOFError, ConnectionResetError):
            self.heard.add("death")

    def _take_in(self, kind: str, *content: Any) -> None:
        match kind, content:
            case "tokens", (request_id, token_ids, is_finished):
                stay = self.stays[request_id]
                stay.token_ids += token_ids
                stay.is_finished |= is_finished
            case "arrived", (request_id, num_tokens):
                self.stays[request_id] = Stay(num_tokens)
            case "report", (report,):
                self.reports.append(report)
            case "ready", (endpoint,):
                self.endpoint = endpoint
            case "described", (description,):
                self.description = description
            case _:
                self.heard.add(kind)

    def end(self) -> None:
        """Whatever state it is in, stopped included."""
        self.process.kill()
        self.process.join()
        self._connection.close()


def until(
    condition: Callable[[], bool], instances: Sequence[RemoteInstance], what: str = ""
) -> None:
    """Listen until something is so."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        for instance in instances:
            if "death" not in instance.heard:
                instance.listen()
        if condition():
            return
        assert time.monotonic() < deadline_s, f"not in {PATIENCE_S:.0f} s: {what}"
        time.sleep(POLL_S)
