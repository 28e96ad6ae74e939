"""The engine port of an instance, on stock vLLM.

An engine core and what stands around it: exports and imports, load reports, the record of cached
prefixes, and requests taken over from an instance that died. Knows no messages and no migrator.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.engine.base import StepAhead
from llumsched.engine.vllm.compat import start_watchdog
from llumsched.engine.vllm.core import EngineSettings, LlumschedEngineCore
from llumsched.engine.vllm.gloo_device import share_gloo_device
from llumsched.engine.vllm.load import LoadReader
from llumsched.engine.vllm.migration import MigrationAdapter
from llumsched.engine.vllm.migration.resumption import Resumption
from llumsched.engine.vllm.patches import prove_membership
from llumsched.engine.vllm.prefix_blocks import PrefixBlockRecorder
from llumsched.engine.vllm.warm_up import warm_up
from llumsched.wire.keys import PoolKeys

T = TypeVar("T")


class VllmEngine:
    """Implements ``engine.base.InstanceEngine``."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        instance_id: str,
        keys: PoolKeys,
        reports_prefix_blocks: bool,
    ) -> None:
        prove_membership(keys)
        share_gloo_device()
        self._core = core = LlumschedEngineCore(settings)
        warm_up(core)
        self.migration = MigrationAdapter(core)
        self.prefix_blocks = (
            PrefixBlockRecorder(core.scheduler, instance_id) if reports_prefix_blocks else None
        )
        self._load = LoadReader(core, instance_id)
        self.migration.on_release = self._load.forget
        self.engine_index = settings.engine_index
        core.observe(
            after_step=self.migration.after_step,
            on_abort=self.migration.on_abort,
            on_add=self._load.on_add,
        )

    @property
    def step_time_s(self) -> float:
        return self._core.step_time_s

    def step_ahead(self) -> StepAhead:
        return self._core.step_ahead()

    def spec(self) -> InstanceSpec:
        kv = self.migration.kv
        return replace(
            self._load.spec(), block_num_bytes=sum(kv.block_num_bytes) if kv is not None else 0
        )

    def call(self, function: Callable[[], T]) -> Future[T]:
        return self._core.call(function)

    def ping(self) -> Callable[[], bool]:
        return self._core.ping()

    def attach(
        self, *, after_step: Callable[[], None], give_up_arrival: Callable[[str], Future[None]]
    ) -> None:
        self._core.observe(after_step=after_step)
        self._core.frontend_calls = Resumption(self._core, self.migration, give_up_arrival)

    def run(self) -> None:
        start_watchdog(self._core.vllm_config, f"engine_{self.engine_index}")
        self._core.run()

    def request_shutdown(self) -> None:
        self._core.request_shutdown()

    def close(self) -> None:
        self.migration.close()

    def request_ids(self) -> tuple[str, ...]:
        return tuple(self._core.scheduler.requests)

    def abort_requests(self, request_ids: list[str]) -> None:
        self._core.abort_requests(request_ids)

    def connect_frontend(self, client_index: int, input_address: str, output_address: str) -> None:
        self._core.joined.connect(client_index, input_address, output_address)

    def disconnect_frontend(self, client_index: int) -> None:
        self._core.joined.disconnect(client_index)

    def abort_client(self, client_index: int) -> list[str]:
        return self._core.abort_client(client_index)

    def load_has_changed_much(self) -> bool:
        return self._load.has_changed_much()

    def read_load(
        self,
        *,
        num_reserved_blocks: int,
        num_migrations_in: int,
        num_migrations_out: int,
        victim_blocks: int | None,
    ) -> InstanceLoad:
        return self._load.read(
            num_reserved_blocks=num_reserved_blocks,
            num_migrations_in=num_migrations_in,
            num_migrations_out=num_migrations_out,
            victim_blocks=victim_blocks,
        )
