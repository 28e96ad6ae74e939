"""The fake engine as that of an instance: what an engine of one's own begins with."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.engine.base import StepAhead
from tests.fake_engine.request import FakeOutput
from tests.fake_engine.tensors import TensorEngine

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSettings:
    """Of one instance; a step takes ``step_s``."""

    engine: ClassVar[str] = "fake"
    engine_index: int
    num_blocks: int = 128
    block_size: int = 8
    step_s: float = 0.004
    device: str = "cpu"


class FakeInstanceEngine:
    """Implements ``engine.base.InstanceEngine``; ``outputs`` are tokens by request and position."""

    prefix_blocks = None

    def __init__(self, settings: FakeSettings, *, instance_id: str, **_: object) -> None:
        self._settings = settings
        self._instance_id = instance_id
        self.engine_index = settings.engine_index
        self.step_time_s = settings.step_s
        self.migration = TensorEngine(
            num_blocks=settings.num_blocks,
            block_size=settings.block_size,
            device=torch.device(settings.device),
        )
        self.outputs: dict[str, dict[int, int]] = {}
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._after_step: Callable[[], None] = lambda: None
        self._is_ending = False
        self._known: set[str] = set()
        self._sequence = 0

    def step_ahead(self) -> StepAhead:
        return StepAhead(step_s=self.step_time_s)

    def spec(self) -> InstanceSpec:
        return InstanceSpec(
            instance_id=self._instance_id,
            num_total_blocks=self._settings.num_blocks,
            block_size=self._settings.block_size,
        )

    def call(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:  # the caller's
                future.set_exception(error)

        self._calls.put(run)
        return future

    def ping(self) -> Callable[[], bool]:
        return self.call(lambda: None).done

    def attach(self, *, after_step: Callable[[], None], give_up_arrival: object) -> None:
        self._after_step = after_step

    def run(self) -> None:
        while not self._is_ending:
            while not self._calls.empty():
                self._calls.get()()
            self.migration.schedule_step()
            self._take_in(self.migration.finish_step())
            self._after_step()
            time.sleep(self._settings.step_s)

    def _take_in(self, outputs: tuple[FakeOutput, ...]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, {})[output.position] = output.token_id

    def request_shutdown(self) -> None:
        self._is_ending = True

    def close(self) -> None:
        pass

    def request_ids(self) -> tuple[str, ...]:
        return tuple(self.migration.requests)

    def abort_requests(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.migration.abort(request_id)

    def connect_frontend(self, client_index: int, input_address: str, output_address: str) -> None:
        pass

    def disconnect_frontend(self, client_index: int) -> None:
        pass

    def abort_client(self, client_index: int) -> list[str]:
        return []

    def load_has_changed_much(self) -> bool:
        return self._known != set(self.migration.requests)

    def read_load(self, *, num_reserved_blocks: int, **counts: Any) -> InstanceLoad:
        before, self._known = self._known, set(self.migration.requests)
        self._sequence += 1
        return InstanceLoad(
            instance_id=self._instance_id,
            sequence=self._sequence,
            num_total_blocks=self._settings.num_blocks,
            num_free_blocks=self.migration.pool.num_free_blocks,
            num_reserved_blocks=num_reserved_blocks,
            num_running=len(self.migration.running),
            num_waiting=len(self.migration.waiting),
            received_request_ids=tuple(sorted(self._known - before)),
            finished_request_ids=tuple(sorted(before - self._known)),
            **counts,
        )
