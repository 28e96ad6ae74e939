"""Two simulated instances of vLLM V1, with the migrations of the simulator between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llumsched.core.actions import PolicyFailed, StartMigration
from llumsched.core.events import MigrationFinished, MigrationOutcome
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.simulator.cluster.migration_source import Migrations
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.cost import StepCost, copy_ps
from llumsched.simulator.engines.kv_cache import PrefixCache
from llumsched.simulator.engines.machine import Costs
from llumsched.simulator.engines.request import DECODING, LiveRequest
from llumsched.simulator.engines.vllm_v1 import EngineV1
from llumsched.simulator.kernel import STEP, Kernel, to_ps
from tests.contract.subjects import BLOCK_SIZE, MAX_BATCHED_TOKENS, NUM_BLOCKS
from tests.simulator.clusters import make_hardware


class ObservedEngine(EngineV1):
    """Remembers how many blocks were in use before it scheduled the step under way."""

    num_used_between = 0

    def _schedule(self, now: int) -> None:
        self.num_used_between = self.num_used + self.num_reserved
        super()._schedule(now)


class SimulatedInstances:
    """The engines' host as well: it tells migrations what happens to their requests."""

    def __init__(self) -> None:
        hardware = make_hardware(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        cost = StepCost(hardware.step, MAX_BATCHED_TOKENS)
        self._kernel = Kernel()
        self._engines = [self._engine(index, cost) for index in range(2)]
        self._requests: dict[str, LiveRequest] = {}
        self._ended: list[MigrationFinished] = []
        self._migrations = Migrations(
            kernel=self._kernel,
            host=self,
            victim=None,
            options=MigrationOptions(),
            message_delay=to_ps(0.0005),
            copy=lambda num_blocks: copy_ps(hardware.copy, num_blocks * BLOCK_SIZE),
        )

    def _engine(self, index: int, cost: StepCost) -> ObservedEngine:
        return ObservedEngine(
            index=index,
            instance_id=f"instance-{index}",
            host=self,
            kernel=self._kernel,
            costs=Costs(cost, cost),
            costs_copying=Costs(cost, cost),
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_seqs=16,
            max_batched_tokens=MAX_BATCHED_TOKENS,
            watermark_blocks=0,
            cache=PrefixCache(),
            step_by_step=True,
        )

    # ---- what a test asks -------------------------------------------------------------------

    def submit(self, request_id: str, prompt: Sequence[int], num_output_tokens: int) -> None:
        now = self._kernel.now
        row = len(self._requests)
        full = range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE)
        hashes = [hash(tuple(prompt[:end])) for end in full]
        request = LiveRequest(row, request_id, len(prompt), num_output_tokens, 0, now, hashes)
        self._requests[request_id] = request
        self._engines[0].add(request, now)

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            time, priority, _, item = self._kernel.pop()
            if priority != STEP:
                item(time)
            elif item.due == time:
                item.end_of_segment(time)

    def num_tokens(self, request_id: str) -> int:
        request = self._requests[request_id]
        if request.phase != DECODING:
            return request.generated
        progress: int = request.place.progress
        return request.num_output - request.finish_step + progress

    def num_preemptions(self, request_id: str) -> int:
        return self._requests[request_id].num_preemptions

    def num_used_blocks(self, index: int) -> int:
        engine = self._engines[index]
        is_idle = engine.due < 0
        return engine.num_used + engine.num_reserved if is_idle else engine.num_used_between

    def move(self, request_id: str) -> None:
        source, destination = self._engines
        order = StartMigration(
            migration_id=f"m-{request_id}",
            source=source.instance_id,
            destination=destination.instance_id,
            request_id=request_id,
            reason="a test",
        )
        request = self._requests[request_id]
        self._migrations.start(order, request, source, destination, self._kernel.now)
        self.until(lambda: bool(self._ended))
        assert self._ended.pop().outcome is MigrationOutcome.COMMITTED

    # ---- what the engines and migrations tell -----------------------------------------------

    def finished(self, engine: Engine, request: LiveRequest, now: int) -> None:
        if request.migration is not None:
            self._migrations.request_finished(request, now)

    def suspended(self, engine: Engine, request: LiveRequest, now: int) -> None:
        self._migrations.request_suspended(request, now)

    def load_changed(self, engine: Engine, num_free_blocks: int, now: int) -> None:
        pass

    def preempted(self, engine: Engine, request: LiveRequest, now: int) -> None:
        if request.migration is not None:
            self._migrations.request_preempted(request, now)

    def policy_failed(self, failed: PolicyFailed) -> None:
        raise AssertionError(failed)

    def migration_ended(self, event: MigrationFinished, now: int) -> None:
        self._ended.append(event)
