"""An instance of the tests' pool: an engine core that is stepped by hand, and its parts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform

from llumsched.engine.vllm.core import LlumschedEngineCore
from llumsched.engine.vllm.migration import MigrationAdapter
from llumsched.migration.migrator import Migrator


@contextmanager
def kernels_found() -> Iterator[None]:
    """vLLM 0.32 looks for its kernels in every module as an engine boots, and trips over those of
    numba, which drafts of n-grams import."""
    register = current_platform.register_triton_kernel_overrides

    def without_numba() -> None:
        with pytest.MonkeyPatch.context() as patched:
            for name in [name for name in sys.modules if name.startswith("llvmlite")]:
                patched.delitem(sys.modules, name)
            register()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(current_platform, "register_triton_kernel_overrides", without_numba)
        yield


class SteppedCore(LlumschedEngineCore):
    """An engine core whose outputs stay in its queue."""

    def process_input_sockets(self, *arguments: Any) -> None:
        *_, ready = arguments
        ready.set()

    def process_output_sockets(self, *_: Any) -> None:
        pass


@dataclass(slots=True, eq=False)
class Instance:
    """One engine with its migrator. ``hangs``: it is not stepped and runs no closure."""

    index: int
    core: SteppedCore
    port: MigrationAdapter
    migrator: Migrator
    hangs: bool = False

    @property
    def name(self) -> str:
        return f"instance-{self.index}"

    @property
    def num_free_blocks(self) -> int:
        free: int = self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return free

    @property
    def num_used_blocks(self) -> int:
        """Blocks of requests, not counting vLLM's null block."""
        used: int = self.core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
        return used - self.num_free_blocks


@dataclass(slots=True)
class Answer:
    """One request's answer as its client sees it."""

    final: RequestOutput | None = None
    sequence_ids: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.final is not None and self.final.finished
