"""Engines that cannot give a request away, or take one over, say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest
import torch
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_lm_format_enforcer import LMFormatEnforcerBackend
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from llumsched.engine.base import CannotMigrate, FinalState, Refusal
from llumsched.engine.vllm.migration.state import why_engine_cannot_migrate, why_no_grammar
from tests.engine.scheduled import NUM_BLOCKS, Engine, answer_of, engine_config

PROMPT = [7, 8, 9, 10, 11]

SIZES: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 1,
    "head_size": 32,
    "dtype": torch.float32,
}
FULL = FullAttentionSpec(**SIZES)
OTHER_FULL = FullAttentionSpec(**SIZES | {"head_size": 64})
WINDOW = SlidingWindowSpec(sliding_window=64, **SIZES)


def state(**fields: Any) -> MambaSpec:
    return MambaSpec(block_size=1024, shapes=((8,),), dtypes=(torch.float32,), **fields)


def kv_cache(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.fixture
def config(tmp_path: Path) -> VllmConfig:
    return engine_config(tmp_path)


@pytest.mark.parametrize(
    "specs",
    [
        (FULL,),
        (MLAAttentionSpec(**SIZES),),
        (WINDOW,),
        (FULL, WINDOW),
        (FULL, ChunkedLocalAttentionSpec(attention_chunk_size=32, **SIZES)),
        (FULL, state()),
        (FULL, state(num_prefill_checkpoint_blocks=1)),
        (FULL, state(mamba_cache_mode="align")),
        (UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": OTHER_FULL}),),
    ],
    ids=[
        "full",
        "MLA",
        "window",
        "hybrid",
        "chunks",
        "states",
        "states of Mamba 2",
        "states of prefixes",
        "layers of two sizes",
    ],
)
def test_a_cache_that_moves(config: VllmConfig, specs: tuple[Any, ...]) -> None:
    assert why_engine_cannot_migrate(config, kv_cache(*specs)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c, _: setattr(c.model_config, "enable_sleep_mode", True), "--enable-sleep-mode"),
        (lambda c, m: m.setitem(vars(c.model_config), "is_diffusion", True), "diffusion model"),
        (
            lambda c, _: setattr(c.aux_output_config, "enable_return_routed_experts", True),
            "--enable-return-routed-experts",
        ),
    ],
    ids=["sleep mode", "diffusion", "routed experts"],
)
def test_what_is_switched_on(
    config: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    change(config, monkeypatch)
    assert reason in (why_engine_cannot_migrate(config, kv_cache(FULL)) or "")


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ((RSWASpec(rswa_window=64, **SIZES),), "RSWASpec"),
        ((SinkFullAttentionSpec(sink_len=4, **SIZES),), "SinkFullAttentionSpec"),
        ((FULL, RSWASpec(rswa_window=64, **SIZES)), "RSWASpec"),
        ((FULL, state(num_speculative_blocks=2)), "a state for each draft"),
        (
            (FULL, state(mamba_cache_mode="align", num_prefill_checkpoint_blocks=1)),
            "within a prompt",
        ),
        ((FULL, state(mamba_type=MambaAttentionBackendEnum.MAMBA1)), "MAMBA1"),
        ((), "no KV cache"),
    ],
    ids=[
        "R-SWA",
        "sinks",
        "one of two groups",
        "states of drafts",
        "states of prefixes",
        "states of another kind",
        "none",
    ],
)
def test_a_kv_cache_that_does_not_move(
    config: VllmConfig, specs: tuple[Any, ...], reason: str
) -> None:
    assert reason in (why_engine_cannot_migrate(config, kv_cache(*specs)) or "")


# ---- arrivals -----------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Engine, Engine]:
    """Two engines, the first of which decodes the request ``a``."""
    here, there = Engine(engine_config(tmp_path)), Engine(engine_config(tmp_path))
    here.submit("a", PROMPT, 20)
    here.until("a", 2)
    return here, there


@pytest.mark.parametrize("everything", [True, False])
def test_a_paused_engine_takes_nobody_in(pair: tuple[Engine, Engine], everything: bool) -> None:
    here, there = pair
    state = here.port.start_export("a")
    there.pause(everything=everything)
    with pytest.raises(CannotMigrate, match="paused") as refused:
        there.port.reserve(state)
    assert refused.value.refusal is Refusal.PAUSED
    there.unpause()
    there.port.reserve(state)
    # Paused while the request moved: it goes on where it is.
    final = here.port.suspend("a").result().final
    there.pause(everything=everything)
    with pytest.raises(CannotMigrate, match="paused"):
        there.port.commit("a", final)
    assert there.num_free_blocks == NUM_BLOCKS - 1
    here.port.resume("a")
    here.finish()
    assert here.answers["a"] == answer_of(PROMPT, 20)


def test_an_engine_that_rejects_requests_takes_nobody_in(pair: tuple[Engine, Engine]) -> None:
    """vLLM 0.33 rejects them from when it is told to pause."""
    here, there = pair
    setattr(there, "reject_new_requests", True)  # noqa: B010
    with pytest.raises(CannotMigrate, match="paused"):
        there.port.reserve(here.port.start_export("a"))


def test_what_lost_its_instance_waits_at_a_paused_engine(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    state = msgspec.structs.replace(here.port.start_export("a"), has_kv=False)
    there.pause()
    there.port.reserve(state, may_wait=True)
    there.answers["a"] = here.answers["a"]
    outputs = state.output_token_ids
    there.port.commit(
        "a", FinalState(output_token_ids=outputs, num_computed_tokens=0, generator_state=None)
    )
    assert not there.step()
    there.unpause()
    there.finish()
    assert there.answers["a"] == answer_of(PROMPT, 20)


BACKENDS: dict[str, type] = {
    "xgrammar": XgrammarBackend,
    "guidance": GuidanceBackend,
    "outlines": OutlinesBackend,
    "lm-format-enforcer": LMFormatEnforcerBackend,
}


@pytest.mark.parametrize("used", [*BACKENDS, None])
@pytest.mark.parametrize("needed", [*BACKENDS, None])
def test_the_backend_of_a_grammar(used: str | None, needed: str | None) -> None:
    """An engine has one, for good."""
    manager: Any = MagicMock()
    manager.backend = object.__new__(BACKENDS[used]) if used is not None else None
    outputs = StructuredOutputsParams(regex="[a-z]+")
    outputs._backend = needed
    request: Any = MagicMock(sampling_params=SamplingParams(structured_outputs=outputs))
    reason = why_no_grammar(manager, request)
    if used is None or needed is None or used == needed:
        assert reason is None
    else:
        assert f"the request needs {needed}" in (reason or "")


def test_no_grammar_needs_no_backend() -> None:
    manager: Any = MagicMock()
    request: Any = MagicMock(sampling_params=SamplingParams())
    assert why_no_grammar(manager, request) is None


def test_an_engine_that_cannot_make_the_grammar(
    pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = pair

    def refuse(_: Any) -> Any:
        raise VLLMValidationError("only supports one backend per engine")

    monkeypatch.setattr(there, "preprocess_add_request", refuse)
    with pytest.raises(CannotMigrate, match="one backend per engine") as refused:
        there.port.reserve(here.port.start_export("a"))
    assert refused.value.refusal is Refusal.GRAMMAR_BACKEND
    assert not refused.value.refusal.is_permanent
    assert there.num_free_blocks == NUM_BLOCKS - 1
