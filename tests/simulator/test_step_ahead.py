"""A move to an instance that computes prompts pauses for one of its steps, whenever it begins."""

from __future__ import annotations

from unittest import mock

import pytest

from llumsched.core.actions import StartMigration
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.simulator.cluster.migration_source import Migrations
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.cost import StepCost, copy_ps
from llumsched.simulator.engines.machine import Costs
from llumsched.simulator.engines.request import LiveRequest
from llumsched.simulator.engines.vllm_v1 import EngineV1
from llumsched.simulator.kernel import STEP, Kernel, to_ps, to_s
from tests.simulator.clusters import make_hardware

BLOCK_SIZE = 16
MAX_BATCHED_TOKENS = 8192


class Instances:
    """A request decodes on one instance, prompts are computed on another."""

    def __init__(self, options: MigrationOptions) -> None:
        hardware = make_hardware(num_blocks=40_000, block_size=BLOCK_SIZE)
        cost = StepCost(hardware.step, MAX_BATCHED_TOKENS)
        self.kernel = Kernel()
        self.host = mock.Mock()
        self.source, self.destination = (self._engine(index, cost) for index in range(2))
        self.migrations = Migrations(
            kernel=self.kernel,
            host=self.host,
            victim=None,
            options=options,
            message_delay=to_ps(0.0005),
            copy=lambda num_blocks: copy_ps(hardware.copy, num_blocks * BLOCK_SIZE),
        )
        self.host.suspended = lambda _, request, now: self.migrations.request_suspended(
            request, now
        )
        self.request = LiveRequest(0, "r", 40, 4000, 0, 0, ())
        self.source.add(self.request, 0)
        for row in range(1, 9):
            prompt = LiveRequest(row, f"prompt {row}", MAX_BATCHED_TOKENS, 2, 0, 0, ())
            self.destination.add(prompt, 0)

    def _engine(self, index: int, cost: StepCost) -> EngineV1:
        return EngineV1(
            index=index,
            instance_id=f"instance-{index}",
            host=self.host,
            kernel=self.kernel,
            costs=Costs(cost, cost),
            costs_copying=Costs(cost, cost),
            num_blocks=40_000,
            block_size=BLOCK_SIZE,
            max_num_seqs=16,
            max_batched_tokens=MAX_BATCHED_TOKENS,
            watermark_blocks=0,
            cache=None,
            step_by_step=False,
        )

    def run_until(self, end: int) -> None:
        while self.kernel.heap[0][0] < end:
            time, priority, _, item = self.kernel.pop()
            if priority != STEP:
                item(time)
            elif isinstance(item, Engine) and item.due == time:
                item.end_of_segment(time)

    def move(self, after: float) -> float:
        """The pause of a move that begins at some part of a step, in steps of the destination."""
        self.run_until(to_ps(1.0))
        begun, (_, step) = self.destination.segment_start, self.destination.step_ahead(0)
        self.run_until(begun + round((1 + after) * step))
        order = StartMigration(
            migration_id="m",
            source=self.source.instance_id,
            destination=self.destination.instance_id,
            request_id="r",
            reason="a test",
        )
        now = self.kernel.now
        self.migrations.start(order, self.request, self.source, self.destination, now)
        self.run_until(now + 4 * step)
        (move,) = self.migrations.moves
        assert move.outcome == "committed"
        return to_s(move.downtime) / to_s(step)


@pytest.mark.parametrize("after", [0.05, 0.3, 0.55, 0.8, 0.95])
def test_the_pause_is_a_step_whenever_the_move_begins(after: float) -> None:
    assert 1.0 < Instances(MigrationOptions()).move(after) < 1.25


def test_without_waiting_the_rest_of_the_step_under_way_adds_to_it() -> None:
    assert Instances(MigrationOptions(max_step_wait_s=0)).move(0.3) > 1.5
