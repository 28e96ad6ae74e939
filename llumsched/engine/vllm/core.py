"""The engine core of one instance: vLLM's own, plus a door for work on its loop thread.

vLLM's scheduler and block pool are not thread safe: only the thread that runs
``run_busy_loop`` may touch them. ``LlumschedEngineCore.call`` carries a closure to that thread and
runs it between two steps; ``before_step`` and ``after_step`` observers run there around every step.
Nothing else of the engine core changes: requests come in and tokens go out on vLLM's own sockets.

This module knows how the busy loop works. It does not know what a migration is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec
from vllm.config import VllmConfig
from vllm.logger import configure_logging
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor
from vllm.v1.request import Request

from llumsched.core.step_time import MeasuredStep
from llumsched.engine.base import StepAhead
from llumsched.engine.vllm.joined_frontends import JoinedFrontends
from llumsched.engine.vllm.step_clock import StepClock
from llumsched.engine.vllm.step_recorder import StepRecorder

T = TypeVar("T")

# Weight of the newest step in the moving average of the step time.
STEP_TIME_WEIGHT = 0.2


class _LoopCall:
    """Marks an entry of the input queue as a closure of ours rather than a client's request."""


_LOOP_CALL = _LoopCall()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How to build an instance's vLLM engine.

    ``vllm_config`` is shared by every instance of the pool; ``frontend_addresses`` are the
    frontends' sockets, in the same order on every instance, as a request's ``client_index``
    selects its output socket; ``engine_index`` is this instance's ZMQ identity and its label
    in vLLM's metrics.
    """

    engine: ClassVar[str] = "vllm"
    vllm_config: VllmConfig
    frontend_addresses: EngineZmqAddresses
    engine_index: int
    log_stats: bool


class FrontendCalls(Protocol):
    """Calls of a frontend on an instance beside adding and aborting; on the loop thread."""

    def resume(self, encoded: bytes) -> Future[str | None]:
        """Take over a request whose instance died; why not, or ``None``."""

    def missing(self, request_ids: list[str]) -> list[str]:
        """The requests that are not here."""


class LlumschedEngineCore(EngineCoreProc):
    """A stock ``EngineCoreProc`` whose loop thread also runs closures handed to ``call``."""

    scheduler: Scheduler

    def __init__(self, settings: EngineSettings) -> None:
        # As vLLM does where it starts an engine in a process of its own.
        configure_logging(settings.vllm_config.logging_config)
        self._frontend_addresses = settings.frontend_addresses
        self._before_step: list[Callable[[], None]] = []
        self._after_step: list[Callable[[], None]] = []
        self._around_reset: list[Callable[[], AbstractContextManager[None]]] = []
        self._on_abort: list[Callable[[list[str]], None]] = []
        self._on_add: list[Callable[[Request], None]] = []
        self.step_time_s = 0.0
        self.num_steps = 0
        self._step: MeasuredStep | None = None
        self._clock = StepClock()
        self.frontend_calls: FrontendCalls | None = None
        self._is_called = False
        self._preprocessing = threading.Lock()
        super().__init__(
            settings.vllm_config,
            local_client=True,
            handshake_address="",
            executor_class=Executor.get_class(settings.vllm_config),
            log_stats=settings.log_stats,
            engine_index=settings.engine_index,
        )
        self._recorder = StepRecorder(self.scheduler, self._clock.note_batch)
        self.joined = JoinedFrontends(self, len(settings.frontend_addresses.inputs))

    # ---- what the rest of the instance uses -------------------------------------------------

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run ``function`` on the loop thread, before the next step; safe from any thread."""
        future: Future[T] = Future()
        self.input_queue.put_nowait((_LOOP_CALL, (function, future)))  # type: ignore[arg-type]
        return future

    def ping(self) -> Callable[[], bool]:
        """Ask the loop for a sign of life; the returned function says whether there was one.

        A call of the frontend's may rightly wait for anything, such as an adapter from another
        machine, so there need be none meanwhile.
        """
        answer = self.call(lambda: None)
        return lambda: answer.done() or self._is_called

    def observe(
        self,
        *,
        before_step: Callable[[], None] | None = None,
        after_step: Callable[[], None] | None = None,
        around_reset: Callable[[], AbstractContextManager[None]] | None = None,
        on_abort: Callable[[list[str]], None] | None = None,
        on_add: Callable[[Request], None] | None = None,
    ) -> None:
        """Register observers that run on the loop thread; call before ``run``."""
        if before_step is not None:
            self._before_step.append(before_step)
        if after_step is not None:
            self._after_step.append(after_step)
        if around_reset is not None:
            self._around_reset.append(around_reset)
        if on_abort is not None:
            self._on_abort.append(on_abort)
        if on_add is not None:
            self._on_add.append(on_add)

    def step_ahead(self) -> StepAhead:
        """The next boundary between two steps; safe from any thread."""
        return self._clock.ahead(time.perf_counter())

    def take_step(self) -> MeasuredStep | None:
        """A step since the last call, with its batch and duration; on the loop thread.

        Where steps overlap, the batch is of the step that began as the one of this duration ended.
        """
        step, self._step = self._step, None
        self._recorder.is_recording = True
        return step

    def run(self) -> None:
        """Run the busy loop until shutdown is requested, then free the engine."""
        try:
            self.run_busy_loop()
        finally:
            self.shutdown()  # type: ignore[no-untyped-call]

    # vLLM's utility calls find a method by its name.

    def abort_client(self, client_index: int) -> list[str]:
        """End every request of a frontend that is gone; which they were. On the loop thread."""
        requests = self.scheduler.requests.values()
        request_ids = [r.request_id for r in requests if r.client_index == client_index]
        self.abort_requests(request_ids)
        return request_ids

    def resume_request(self, state: bytes) -> Future[str | None]:
        return self._frontend_calls().resume(state)

    def missing_requests(self, request_ids: list[str]) -> list[str]:
        return self._frontend_calls().missing(request_ids)

    def _frontend_calls(self) -> FrontendCalls:
        if self.frontend_calls is None:
            raise RuntimeError("the instance is not up yet")
        return self.frontend_calls

    def request_shutdown(self) -> None:
        """Make ``run`` return after the step under way; safe from any thread."""

        def request() -> None:
            self.shutdown_state = EngineShutdownState.REQUESTED

        self.call(request)

    # ---- where vLLM's loop is extended ------------------------------------------------------

    @contextmanager
    def _perform_handshakes(
        self, *_args: Any, **_kwargs: Any
    ) -> Generator[EngineZmqAddresses, None, None]:
        # The addresses are known before the actor starts, as in vLLM's own Ray actor.
        yield self._frontend_addresses

    def _handle_client_request(self, request_type: EngineCoreRequestType, request: Any) -> None:
        marker: object = request_type
        if marker is not _LOOP_CALL:
            self._is_called = request_type == EngineCoreRequestType.UTILITY
            try:
                super()._handle_client_request(request_type, request)
            finally:
                self._is_called = False
            return
        function, future = request
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:  # the caller's to handle; the loop must go on
            future.set_exception(error)

    def _process_engine_step(self) -> bool:
        for observer in self._before_step:
            observer()
        started_s = time.perf_counter()
        self._clock.begin(started_s)
        model_executed = super()._process_engine_step()
        ended_s = time.perf_counter()
        self._clock.end(ended_s, was_computed=model_executed, has_more=self.has_work())
        if model_executed:
            self.num_steps += 1
            elapsed_s = ended_s - started_s
            self.step_time_s += STEP_TIME_WEIGHT * (elapsed_s - self.step_time_s)
            batch = self._recorder.take()
            if batch is not None:
                # One a report is enough: looking at a batch takes time between two steps.
                self._step = msgspec.structs.replace(batch, seconds=elapsed_s)
                self._recorder.is_recording = False
        for observer in self._after_step:
            observer()
        return model_executed

    def preprocess_add_request(self, request: EngineCoreRequest) -> tuple[Request, int]:
        # vLLM has one thread that takes requests, and each frontend that joins another.
        with self._preprocessing:
            found: tuple[Request, int] = super().preprocess_add_request(request)
        return found

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        super().add_request(request, request_wave)
        for observer in self._on_add:
            observer(request)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        with ExitStack() as stack:
            for around in self._around_reset:
                stack.enter_context(around())
            was_reset: bool = super().reset_prefix_cache(reset_running_requests, reset_connector)
        return was_reset

    def abort_requests(self, request_ids: list[str]) -> None:
        for observer in self._on_abort:
            observer(request_ids)
        super().abort_requests(request_ids)
