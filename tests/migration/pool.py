"""Real vLLM engines in one process, stepped by hand, that move requests to one another.

Engines, schedulers, workers, migrators, their sockets and their rings are the real ones; only the
loop that steps an engine is here, so that a test says what happens between two steps. An engine may
be made to hang (it is not stepped, and answers nothing) or to die (its sockets close as well). The
order in which outputs are passed on is the frontend's own (``llumsched.frontend.routing.routes``).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine import core as vllm_core
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.metrics.stats import IterationStats

from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.vllm.core import EngineSettings
from llumsched.engine.vllm.migration import HAND_OVER_CALL_ID, MigrationAdapter
from llumsched.frontend.routing.routes import Arrival, Passed, Routes
from llumsched.migration.migrator import Migrator
from llumsched.wire.control import OrderMigration, ReportMigration
from llumsched.wire.keys import PoolKeys
from tests import runner_v2
from tests.migration.stepped import Answer, Instance, SteppedCore, kernels_found

BLOCK_SIZE = 32
NUM_BLOCKS = 97
# All kinds of request at once take an interpreter an hour.
PATIENCE_S = 7200.0 if runner_v2.IS_ON else 180.0
IDLE_S = 0.0005
# While a request moves its engine leaves the processor to the migrators for so long after each
# step: the answers are short, and on a busy machine they would end before the move does.
BREATH_S = 0.02
# Nor does copying wait for its share of a core; what limits that is tested where a test says so.
TRANSFER = TransferOptions(core_share=1.0)

_OF_REASONING = ("reasoning_ended", "reasoning_parser_kwargs")

ENGINE_FLAGS: dict[str, Any] = {
    "dtype": "float32",  # tokens are equal whatever else is in the batch
    "enforce_eager": True,
    "block_size": BLOCK_SIZE,
    "max_model_len": 1024,
    "num_gpu_blocks_override": NUM_BLOCKS,
    "kv_cache_memory_bytes": 256 << 20,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 16,
    "disable_log_stats": False,
    "seed": 0,
}


@contextmanager
def events_that_are_over() -> Iterator[None]:
    """While this lasts vLLM's asynchronous scheduling runs on a CPU.

    Its scheduler, its queue of steps and its worker's bookkeeping are the real ones. What it waits
    for are events on a GPU; here the work is done when they are made.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "Event", MagicMock())
        patched.setattr(torch.cuda, "current_stream", MagicMock())
        patched.setattr(torch.cuda, "stream", lambda _: nullcontext())
        yield


class Pool:
    """``num_instances`` engines and the frontend before them.

    ``stats`` are the frontend's own, one a step with outputs. ``of_each`` are flags of one instance
    each, beside ``flags``, which are of all. With ``async_scheduling`` see
    ``events_that_are_over``. Use as a context manager.
    """

    _num_open: ClassVar[int] = 0

    def __init__(
        self,
        model: str,
        *,
        num_instances: int = 2,
        options: MigrationOptions | None = None,
        transfer: TransferOptions | None = None,
        async_scheduling: bool = False,
        of_each: Sequence[Mapping[str, Any]] = (),
        **flags: Any,
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

        def engine_config(more: Mapping[str, Any]) -> VllmConfig:
            arguments = EngineArgs(model=model, **(ENGINE_FLAGS | flags | dict(more)))
            config: VllmConfig = arguments.create_engine_config()
            # Not by the flag: on a CPU vLLM turns it off again, as there it saves nothing.
            config.scheduler_config.async_scheduling = async_scheduling
            return config

        config = engine_config({})
        self._renderer = renderer_from_config(config)
        self.tokenizer = self._renderer.tokenizer
        self._inputs = InputProcessor(config, self._renderer)
        self._outputs = OutputProcessor(self.tokenizer, log_stats=True)
        self._options = options or MigrationOptions()
        self._transfer = transfer or TRANSFER
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever,
            name="migrators",
            daemon=True,  # an engine may not boot
        )
        self._thread.start()
        self._num_migrations = 0
        self._keys = PoolKeys.generate()
        self.routes = Routes()
        self.answers: dict[str, Answer] = {}
        self.stats: list[IterationStats] = []
        # A configuration also registers the layers of its own model, so each needs one.
        self.instances = [
            self._boot(index, engine_config(of_each[index] if of_each else {}))
            for index in range(num_instances)
        ]

    def _boot(self, index: int, config: Any) -> Instance:
        settings = EngineSettings(
            vllm_config=config,
            # As many as requests of the tests say that they come from.
            frontend_addresses=EngineZmqAddresses(inputs=["none"] * 2, outputs=["none"] * 2),
            engine_index=index,
            log_stats=True,
        )
        with kernels_found():
            core = SteppedCore(settings)
        assert config.use_v2_model_runner is runner_v2.IS_ON
        port = MigrationAdapter(core)
        core.observe(after_step=port.after_step, on_abort=port.on_abort)
        return Instance(index, core, port, self._migrator(index, core, port))

    def _migrator(self, index: int, core: SteppedCore, port: MigrationAdapter) -> Migrator:
        async def make() -> Migrator:
            return Migrator(
                instance_id=f"instance-{index}",
                port=port,
                call=core.call,
                abort=lambda request_id: _ignore(
                    core.call(lambda: core.abort_requests([request_id]))
                ),
                keys=self._keys,
                host="127.0.0.1",
                step_time_s=lambda: core.step_time_s,
                step_ahead=core.step_ahead,
                options=self._options,
                transfer=self._transfer,
            )

        migrator: Migrator = self.on_loop(make())
        return migrator

    def configure(
        self, *, options: MigrationOptions | None = None, transfer: TransferOptions | None = None
    ) -> None:
        """Give every instance a new migrator with these options; nothing may be under way."""
        self._options = options or MigrationOptions()
        self._transfer = transfer or TRANSFER
        for instance in self.instances:
            self.on_loop(instance.migrator.close())
            instance.migrator = self._migrator(instance.index, instance.core, instance.port)

    def on_loop(self, coroutine: Any) -> Any:
        """Run a coroutine on the migrators' loop, while no engine is stepped."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def __enter__(self) -> Pool:
        Pool._num_open += 1
        return self

    def __exit__(self, *_: object) -> None:
        Pool._num_open -= 1
        for instance in self.instances:
            self.on_loop(instance.migrator.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for instance in self.instances:
            instance.port.close()
            with pytest.MonkeyPatch.context() as patched:
                if Pool._num_open:
                    # All engines of a process share its group of workers.
                    patched.setattr(vllm_core, "cleanup_dist_env_and_memory", lambda: None)
                instance.core.shutdown()  # type: ignore[no-untyped-call]

    def recover(self) -> None:
        """After a test that failed: whatever it has left is thrown away."""
        if self.leftovers():
            self.answers.clear()
            for instance in self.instances:
                self.on_loop(instance.migrator.close())
                self.restart(instance.index)
                for _ in range(2):
                    self._step_one(instance)

    def forget_everything(self) -> None:
        """No cached prefix is known, and no block still holds what it did."""
        for instance in self.instances:
            assert instance.core.reset_prefix_cache(), self.leftovers()
            instance.core.collective_rpc(_zero_blocks)
        self.stats.clear()

    # ---- faults -----------------------------------------------------------------------------

    def kill(self, index: int) -> None:
        """End an instance, and tell whoever would be told: its peers and the frontend."""
        dead = self.instances[index]
        dead.hangs = True
        self.on_loop(dead.migrator.close())
        for other in self.instances:
            if other is not dead:
                self._loop.call_soon_threadsafe(other.migrator.peer_gone, dead.name)
        for sequence_id, route in self.routes:
            holders = self.routes.holders(route)
            if index in holders:
                self.routes.close(sequence_id)
                self._outputs.abort_requests([sequence_id], internal=True)
                for other_index in holders - {index}:
                    self._abort_at(other_index, sequence_id)

    def restart(self, index: int) -> None:
        """Put an instance in the place of a dead one; it knows nothing of before."""
        instance = self.instances[index]
        core, port = instance.core, instance.port
        while not core.input_queue.empty():
            core.input_queue.get_nowait()
        while not core.output_queue.empty():
            core.output_queue.get_nowait()
        for request_id in list(port._exports):
            port.release(request_id)
        for request_id in list(port._imports):
            port.cancel(request_id)
        core.abort_requests(list(core.scheduler.requests))
        instance.migrator = self._migrator(index, core, port)
        instance.hangs = False

    # ---- requests ---------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        at: int = 0,
        **fields: Any,
    ) -> Answer:
        """Send a request to one instance. ``fields`` are ``InputProcessor.process_inputs``'s, those
        of reasoning, which ``AsyncLLM`` sets in the same way, and ``multi_modal_data``."""
        reasoning = {name: fields.pop(name) for name in _OF_REASONING if name in fields}
        params = params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
        prompt: Any = {"type": "token", "prompt_token_ids": list(prompt_token_ids)}
        if "multi_modal_data" in fields:
            del prompt["type"]
            prompt["multi_modal_data"] = fields.pop("multi_modal_data")
            (prompt,) = self._renderer.render_cmpl([prompt])
        if "cache_salt" in fields:
            prompt["cache_salt"] = fields.pop("cache_salt")
        request = self._inputs.process_inputs(
            request_id, prompt, params, supported_tasks=("generate",), **fields
        )
        self._inputs.assign_request_id(request)
        for name, value in reasoning.items():
            setattr(request, name, value)
        answer = self.answers[request_id] = Answer()
        sampling = request.sampling_params
        assert sampling is not None
        if sampling.n == 1:
            self._send(request, None, 0, answer, at)
            return answer
        parent = ParentRequest(request)
        for number in range(sampling.n):
            child = copy(request)
            child.request_id, child.sampling_params = parent.get_child_info(number)
            self._send(child, parent, number, answer, at)
        return answer

    def _send(
        self,
        request: EngineCoreRequest,
        parent: ParentRequest | None,
        number: int,
        answer: Answer,
        at: int,
    ) -> None:
        self._outputs.add_request(request, None, parent, number)
        route = self.routes.open(request.request_id, request.external_req_id)
        route.instance = at
        answer.sequence_ids.append(request.request_id)
        core = self.instances[at].core
        core.add_request(*core.preprocess_add_request(request))

    def abort(self, request_id: str) -> None:
        """The client of a request leaves."""
        answer = self.answers.pop(request_id)
        self._abort_sequences(answer.sequence_ids)
        self._outputs.abort_requests(answer.sequence_ids, internal=True)

    def _abort_sequences(self, sequence_ids: Sequence[str]) -> None:
        for sequence_id in sequence_ids:
            route = self.routes.close(sequence_id)
            if route is not None:
                for index in self.routes.holders(route):
                    self._abort_at(index, sequence_id)

    def _abort_at(self, index: int, sequence_id: str) -> None:
        core = self.instances[index].core
        _ignore(core.call(lambda: core.abort_requests([sequence_id])))

    def num_tokens(self, request_id: str) -> int:
        """Tokens of the request's first unfinished sequence that its client has."""
        routes = [self.routes.get(i) for i in self.answers[request_id].sequence_ids]
        counts = [route.num_tokens for route in routes if route is not None]
        return counts[0] if counts else 1 << 30

    def where(self, sequence_id: str) -> int:
        """The instance that a sequence's next token comes from."""
        route = self.routes.get(sequence_id)
        assert route is not None, f"{sequence_id} has finished"
        assert route.instance is not None
        return route.instance

    # ---- steps ------------------------------------------------------------------------------

    def step(self) -> None:
        """One step of each engine, and what came before it; outputs reach their clients."""
        is_idle = True
        for instance in self.instances:
            if not instance.hangs:
                is_idle &= not self._step_one(instance)
        if is_idle:
            time.sleep(IDLE_S)

    def _step_one(self, instance: Instance) -> bool:
        core = instance.core
        while not core.input_queue.empty():
            core._handle_client_request(*core.input_queue.get_nowait())
        busy = core.has_work()
        if busy:
            core._process_engine_step()
        while not core.output_queue.empty():
            _, outputs = core.output_queue.get_nowait()
            assert isinstance(outputs, EngineCoreOutputs)
            self._take_in(instance.index, outputs)
        return busy

    def _take_in(self, index: int, outputs: EngineCoreOutputs) -> None:
        utility = outputs.utility_output
        if utility is not None:
            assert utility.call_id == HAND_OVER_CALL_ID
            assert utility.result is not None
            sequence_id, num_moves, num_tokens = utility.result.result
            passed, _, wanted = self.routes.arrive(
                sequence_id, Arrival(index, num_moves, num_tokens)
            )
            if not wanted:
                self._abort_at(index, sequence_id)
        else:
            passed, _ = self.routes.pass_on(index, outputs.outputs)
        self._pass_on(passed, outputs.timestamp)

    def _pass_on(self, passed: Sequence[Passed], timestamp: float) -> None:
        for part in passed:
            stats = IterationStats()
            done = self._outputs.process_outputs(
                list(part.outputs),  # type: ignore[arg-type]
                engine_core_timestamp=timestamp,
                iteration_stats=stats,
            )
            self.stats.append(stats)
            self._abort_sequences(done.reqs_to_abort)
            for output in done.request_outputs:
                if isinstance(output, RequestOutput) and output.request_id in self.answers:
                    self.answers[output.request_id].final = output

    def until(self, condition: Callable[[], bool], what: str = "") -> None:
        """Step until something is so."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s, f"not in {PATIENCE_S:.0f} s: {what}"
            self.step()

    def finish(self, *request_ids: str) -> list[RequestOutput]:
        """Step until these requests are done; their answers."""
        self.until(lambda: all(self.answers[i].done for i in request_ids), f"{request_ids} finish")
        finals = [self.answers.pop(i).final for i in request_ids]
        return [final for final in finals if final is not None]

    # ---- migrations -------------------------------------------------------------------------

    def start_move(
        self, sequence_id: str, to: int, at: int | None = None
    ) -> Future[ReportMigration]:
        """Order a migration; it goes on while engines are stepped. ``at`` is where it is now."""
        source = self.instances[self.where(sequence_id) if at is None else at]
        self._num_migrations += 1
        destination = self.instances[to]
        order = OrderMigration(
            migration_id=f"m{self._num_migrations}",
            destination=destination.name,
            destination_endpoint=destination.migrator.endpoint,
            request_id=sequence_id,
            reason="a test",
        )
        return asyncio.run_coroutine_threadsafe(
            source.migrator.migrate(order, sequence_id), self._loop
        )

    def move(self, sequence_id: str, to: int, at: int | None = None) -> ReportMigration:
        """Move a sequence, stepping the engines until that is over, and its arrival is known."""
        source = self.instances[self.where(sequence_id) if at is None else at]
        self.until(lambda: source.migrator._incoming.may_leave(sequence_id), "the last move closes")
        (report,) = self.until_moved(self.start_move(sequence_id, to, at))
        return report

    def until_moved(self, *moves: Future[ReportMigration]) -> list[ReportMigration]:
        """Step until these migrations are over."""

        def over() -> bool:
            # Of the loop's own time: on a machine whose cores are taken it gets little of them.
            self.on_loop(asyncio.sleep(BREATH_S))
            return all(move.done() for move in moves)

        self.until(over, "the moves are over")
        return [move.result() for move in moves]

    def connect(self, source: int, destination: int) -> None:
        """Make a link, which otherwise is made when it is first used."""
        migrator, there = self.instances[source].migrator, self.instances[destination]
        assert migrator._here is not None
        self.on_loop(migrator._link(there.name, there.migrator.endpoint, migrator._here))

    def settle(self) -> None:
        """Step until nothing is left of any request or migration; every block must be free."""

        def is_at_rest() -> bool:
            return all(
                not instance.core.has_work()
                and instance.core.input_queue.empty()
                and instance.migrator.num_outgoing == 0
                and instance.migrator.num_incoming == 0
                and not instance.num_used_blocks
                for instance in self.instances
                if not instance.hangs
            )

        self.until(is_at_rest, f"all is at rest: {self.leftovers()}")
        assert not self.leftovers()

    def leftovers(self) -> Mapping[str, Any]:
        """Things that instances that do not hang hold for a request or a migration."""
        found = {}
        for instance in self.instances:
            if instance.hangs:
                continue
            left = {
                "requests": list(instance.core.scheduler.requests),
                "exports": list(instance.port._exports),
                "imports": list(instance.port._imports),
                "used blocks": instance.num_used_blocks,
            }
            if any(left.values()):
                found[instance.name] = {key: value for key, value in left.items() if value}
        return found


def _zero_blocks(worker: Any) -> None:
    for kv_cache in worker.model_runner.kv_caches:
        kv_cache.zero_()


def _ignore(_: Future[Any]) -> None:
    """Nobody waits for this."""
