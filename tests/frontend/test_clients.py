"""Clients that send, wait, leave, are rejected and are moved: nothing of them is kept.

Engines are paused as well, so that requests go where no scheduler has sent them. vLLM's output
processor, the routing client, its routes and the scheduler are the real ones; the instances, and
what lies between them and the frontend, are played. Every list of acts is a run.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.serial_utils import UtilityResult

from llumsched.core.actions import Action, DispatchRequest, RejectRequest
from llumsched.core.events import (
    MigrationFinished,
    MigrationOutcome,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    RequestSentElsewhere,
)
from llumsched.core.types import SchedulingRequest
from llumsched.engine.vllm.migration import HAND_OVER_CALL_ID
from llumsched.frontend.request.rejection import Rejected
from llumsched.frontend.routing.client import RoutingEngineClient
from llumsched.frontend.routing.engine import Engine
from llumsched.frontend.routing.engine_labels import EngineLabels
from llumsched.frontend.routing.request_metrics import FrontendMetrics
from llumsched.frontend.routing.resumer import Resumer
from llumsched.frontend.routing.routes import Routes
from llumsched.frontend.routing.scheduler_client import Withdrawn
from tests.builders import engine_request
from tests.campaigns import examples
from tests.core.builders import Driver
from tests.frontend.engines import engine_that

INSTANCES = (0, 1)
MAX_TOKENS = 4
TURNS = 6
"""Of the loop, in which a request goes as far as it can by itself."""


class NotTaken(EngineCoreOutput):
    """The answer of a paused engine, as vLLM 0.33 has it."""

    error: Any = None


@dataclass
class Running:
    """A request at an instance, and where it is in its life."""

    num_tokens: int = 0
    placement_number: int = 0


@dataclass
class Instance:
    """Takes requests in their order, one block each, and makes a token of each in a step."""

    index: int
    inputs: deque[tuple[str, Any]] = field(default_factory=deque)
    outputs: deque[EngineCoreOutputs] = field(default_factory=deque)
    running: dict[str, Running] = field(default_factory=dict)
    received: list[str] = field(default_factory=list)
    is_paused: bool = False

    def take(self) -> None:
        """The next of what the frontend has sent."""
        if self.inputs:
            what, sent = self.inputs.popleft()
            if what == "add" and self.is_paused:
                answer = NotTaken(
                    request_id=sent.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    error=SimpleNamespace(retryable=True),
                )
                self.outputs.append(EngineCoreOutputs(engine_index=self.index, outputs=[answer]))
            elif what == "add":
                self.running[sent.request_id] = Running()
                self.received.append(sent.request_id)
            else:
                for request_id in sent:
                    self.running.pop(request_id, None)

    def step(self) -> None:
        outputs = []
        for request_id, request in list(self.running.items()):
            is_last = request.num_tokens + 1 == MAX_TOKENS
            outputs.append(
                EngineCoreOutput(
                    request_id=request_id,
                    new_token_ids=[request.num_tokens],
                    finish_reason=FinishReason.LENGTH if is_last else None,
                )
            )
            request.num_tokens += 1
            if is_last:
                del self.running[request_id]
        if outputs:
            self.outputs.append(EngineCoreOutputs(engine_index=self.index, outputs=outputs))

    def arrive(self, request_id: str, request: Running) -> None:
        request.placement_number += 1
        self.running[request_id] = request
        told = [request_id, request.placement_number, request.num_tokens]
        utility = UtilityOutput(call_id=HAND_OVER_CALL_ID, result=UtilityResult(told))
        self.outputs.append(EngineCoreOutputs(engine_index=self.index, utility_output=utility))


class Placer:
    """The scheduler, whose answers arrive when the test says."""

    def __init__(self) -> None:
        self.driver = Driver(max_waiting_per_instance=1, max_queued_requests=3)
        self.driver.join(*(f"instance-{i}" for i in INSTANCES), max_num_seqs=2)
        self._asked: dict[str, asyncio.Future[int]] = {}
        self.last_answered: int | None = None
        self._answers: deque[DispatchRequest | RejectRequest] = deque()

    async def place(self, request: EngineCoreRequest, **_: Any) -> int:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked[request.request_id] = future
        described = SchedulingRequest(request_id=request.request_id, num_prompt_tokens=3)
        self.carry_out(self.driver.handle(RequestArrived(request=described)))
        try:
            await asyncio.wait({future})
            return future.result()
        finally:
            del self._asked[request.request_id]

    def sent_elsewhere(self, request: EngineCoreRequest, instance: int) -> None:
        described = SchedulingRequest(request_id=request.request_id, num_prompt_tokens=3)
        sent = RequestSentElsewhere(request=described, instance_id=f"instance-{instance}")
        self.carry_out(self.driver.handle(sent))

    def moved(self, request_id: str, source: int, destination: int) -> None:
        ended = MigrationFinished(
            migration_id="by hand",
            request_id=request_id,
            source=f"instance-{source}",
            destination=f"instance-{destination}",
            outcome=MigrationOutcome.COMMITTED,
        )
        self.carry_out(self.driver.handle(ended))

    def ended(
        self, request_id: str, *, aborted: bool, num_output_tokens: int | None = None
    ) -> None:
        asked = self._asked.get(request_id)
        if asked is not None and not asked.done():
            asked.set_exception(Withdrawn(request_id))
            asked.exception()
        end = RequestAborted if aborted else RequestFinished
        self.carry_out(self.driver.handle(end(request_id=request_id)))

    def report(self, instance: Instance) -> None:
        received, instance.received = tuple(instance.received), []
        num_running = len(instance.running)
        self.carry_out(
            self.driver.report(
                f"instance-{instance.index}",
                num_used_blocks=num_running,
                num_running=num_running,
                received_request_ids=received,
            )
        )

    def carry_out(self, actions: Iterable[Action]) -> None:
        self._answers.extend(a for a in actions if isinstance(a, DispatchRequest | RejectRequest))

    def answer(self) -> None:
        """The next answer arrives."""
        while self._answers:
            action = self._answers.popleft()
            future = self._asked.get(action.request_id)
            if future is None or future.done():
                continue
            if isinstance(action, DispatchRequest):
                self.last_answered = int(action.request_id.removeprefix("r"))
                future.set_result(int(action.instance_id.removeprefix("instance-")))
            else:
                future.set_exception(Rejected(action.reason, 1.0))
            return


class Client(RoutingEngineClient):
    """A routing client without sockets."""

    def __init__(self, placer: Placer, instances: Sequence[Instance]) -> None:
        self._instances = instances
        self._metrics = FrontendMetrics(CollectorRegistry())
        self.routes = Routes(observer=self._metrics)
        self._placer = placer
        self._resumer = Resumer(self.routes, placer, self, self._give_up)
        self.client_index = 0
        self.outputs_queue = asyncio.Queue()
        self.utility_results = {}
        self.labels = EngineLabels(len(instances))
        for instance in instances:
            self.labels.take(instance.index)
        self._tasks: set[asyncio.Future[None]] = set()
        self._unheard: set[int] = set()

    def shutdown(self, timeout: float | None = None) -> None:
        pass

    def _ensure_output_queue_task(self) -> None:
        pass

    async def add(self, instance: int, request: EngineCoreRequest) -> None:
        self._instances[instance].inputs.append(("add", request))
        await asyncio.sleep(0)

    async def _abort_at(self, instance: int, request_ids: list[str]) -> None:
        self._instances[instance].inputs.append(("abort", list(request_ids)))


class World:
    """The frontend with its clients, and two instances."""

    def __init__(self) -> None:
        self.instances = [Instance(i) for i in INSTANCES]
        self.placer = Placer()
        self.client = Client(self.placer, self.instances)
        self.engine: Engine = engine_that(self.client.add_request_async)
        core: Any = self.engine
        core.engine_core = self.client
        self.clients: list[asyncio.Task[list[int]]] = []
        self._ids = itertools.count()

    def send(self) -> None:
        self.clients.append(asyncio.create_task(self._client(f"r{next(self._ids)}")))

    async def _client(self, request_id: str) -> list[int]:
        """As ``AsyncLLM.generate`` does; the tokens of a request, if it is taken."""
        sampling = SamplingParams(
            max_tokens=MAX_TOKENS, output_kind=RequestOutputKind.DELTA, detokenize=False
        )
        request = engine_request(request_id, external_req_id=request_id, sampling_params=sampling)
        queue = RequestOutputCollector(RequestOutputKind.DELTA, request_id)
        tokens: list[int] = []
        is_taken = False
        try:
            await self.engine._add_request(request, None, None, 0, queue)
            is_taken, finished = True, False
            while not finished:
                output: Any = queue.get_nowait() or await queue.get()
                if output.outputs[0].finish_reason in ("error", "abort"):
                    return []  # every engine is paused, or somebody else has stopped it
                tokens.extend(output.outputs[0].token_ids)
                finished = output.finished
        except Rejected:
            return []
        except asyncio.CancelledError:
            if is_taken:
                await self.engine.abort(request_id, internal=True)
            raise
        assert tokens == list(range(MAX_TOKENS))
        return tokens

    def leave(self, argument: int) -> None:
        living = [client for client in self.clients if not client.done()]
        answered = self.placer.last_answered
        if argument % 2 and answered is not None and not self.clients[answered].done():
            self.clients[answered].cancel()  # as it is sent, if it leaves at once
        elif living:
            living[argument % len(living)].cancel()

    def move(self, argument: int) -> None:
        running = [(i, r) for i in self.instances for r in i.running]
        if running:
            source, request_id = running[argument % len(running)]
            destination = self.instances[1 - source.index]
            destination.arrive(request_id, source.running.pop(request_id))
            self.placer.moved(request_id, source.index, destination.index)

    async def deliver(self, instance: Instance) -> None:
        """Outputs of an instance arrive, and go through vLLM's output processor."""
        if instance.outputs:
            self.client._take_in(instance.outputs.popleft())
        while not self.client.outputs_queue.empty():
            outputs = self.client.outputs_queue.get_nowait()
            assert not isinstance(outputs, Exception)
            done = self.engine.output_processor.process_outputs(outputs.outputs, 0.0, None)
            assert not done.reqs_to_abort

    async def act(self, act: str, argument: int) -> None:
        instance = self.instances[argument % len(self.instances)]
        match act:
            case "send":
                for _ in range(1 + argument % 4):
                    self.send()
            case "leave":
                self.leave(argument)
            case "answer":
                self.placer.answer()
            case "take":
                instance.take()
            case "step":
                instance.step()
                self.placer.report(instance)
            case "deliver":
                await self.deliver(instance)
            case "abort":
                asked = list(self.placer._asked)
                if asked:
                    await self.engine.abort(asked[argument % len(asked)], internal=True)
            case "move":
                self.move(argument)
            case "pause":
                instance.is_paused = not instance.is_paused
        await settle((0, 1, 2, 3, TURNS)[argument % 5])

    def check(self) -> None:
        """Each waiting client is known everywhere, and nobody else."""
        living = {f"r{n}" for n, client in enumerate(self.clients) if not client.done()}
        assert set(self.engine.output_processor.request_states) <= living
        assert {request_id for request_id, _ in self.client.routes} <= living

    async def _pass_time(self, num_rounds: int, *, with_steps: bool) -> None:
        for _ in range(num_rounds):
            self.placer.answer()
            for instance in self.instances:
                instance.take()
                if with_steps:
                    instance.step()
                    self.placer.report(instance)
                await self.deliver(instance)
            await settle()

    async def finish(self) -> None:
        """Let all that is on its way arrive, and then all that has been begun come to its end."""
        await self._pass_time(60, with_steps=False)
        living = {f"r{n}" for n, client in enumerate(self.clients) if not client.done()}
        running = {r for instance in self.instances for r in instance.running}
        assert running <= living, "computed for nobody"
        for instance in self.instances:
            for request_id in instance.running:
                known = self.placer.driver.scheduler.request_instance(request_id)
                assert known == f"instance-{instance.index}", "counted at another instance"
        await self._pass_time(100, with_steps=True)
        await asyncio.gather(*self.clients, return_exceptions=True)
        await settle()
        for instance in self.instances:
            while instance.inputs:
                instance.take()

    def assert_nothing_is_left(self) -> None:
        assert all(client.done() for client in self.clients)
        failures = [c.exception() for c in self.clients if not c.cancelled()]
        assert not any(failures), failures
        processor = self.engine.output_processor
        assert not processor.request_states
        assert not processor.external_req_ids
        assert len(self.client.routes) == 0
        assert not self.client._resumer._kept
        assert not self.placer._asked
        assert self.placer.driver.scheduler.num_requests == 0
        assert not any(instance.running for instance in self.instances), "blocks are held"


async def settle(num_turns: int = TURNS) -> None:
    for _ in range(num_turns):
        await asyncio.sleep(0)


ACTS = (
    *("send", "send", "leave", "abort", "answer", "answer"),
    *("take", "take", "step", "deliver", "move", "pause"),
)


async def play(acts: Sequence[tuple[str, int]]) -> None:
    """Let a world do this, and all that follows from it; nothing may be kept."""
    world = World()
    for act, argument in acts:
        await world.act(act, argument)
    await settle()
    world.check()
    await world.finish()
    world.assert_nothing_is_left()


@settings(max_examples=examples(40))
@given(st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 11)), min_size=20, max_size=60))
def test_whatever_clients_do_nothing_is_kept_of_them(acts: list[tuple[str, int]]) -> None:
    asyncio.run(play(acts))
