"""Images and other inputs of a request move with it, so that they can be encoded again.

vLLM's own scheduler decides when an input is encoded; the encoder is not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.engine import EngineCoreRequest

from llumsched.engine.base import CannotMigrate, Refusal, RequestState
from llumsched.engine.vllm.migration import exports, state
from llumsched.engine.vllm.migration.resumption import state_to_resume, why_not_resumable
from llumsched.engine.vllm.migration.state import decode_request
from tests.engine.scheduled import Engine, answer_of, engine_config, move

IMAGE_TOKEN = 42
NUM_IMAGE_TOKENS = 8
AT = 4
PROMPT = [7, 8, 9, 10, *[IMAGE_TOKEN] * NUM_IMAGE_TOKENS, 11, 12, 13]
NUM_TOKENS = 30
# Larger than what vLLM's encoder keeps in line by itself.
PIXELS = torch.arange(3 * 28 * 28, dtype=torch.bfloat16).reshape(3, 28, 28)


def image(pixels: torch.Tensor | None = PIXELS) -> MultiModalFeatureSpec:
    data = None
    if pixels is not None:
        elements = {"pixel_values": pixels, "grid": torch.tensor([1, 4, 4])}
        data = MultiModalKwargsItem(
            {
                name: MultiModalFieldElem(data=tensor, field=MultiModalBatchedField())
                for name, tensor in elements.items()
            }
        )
    return MultiModalFeatureSpec(
        data=data,
        modality="image",
        identifier="hash of the image",
        mm_position=PlaceholderRange(offset=AT, length=NUM_IMAGE_TOKENS),
        mm_hash="hash of the image",
    )


def request(name: str = "a", *features: MultiModalFeatureSpec) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=PROMPT,
        mm_features=list(features) or [image()],
        sampling_params=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def submit(engine: Engine, asked: EngineCoreRequest) -> None:
    engine.answers[asked.request_id] = []
    engine.add_request(engine.preprocess_add_request(asked)[0])


def encoded(engine: Engine) -> dict[str, list[int]]:
    """Inputs that the encoder computes in the step that was scheduled last."""
    assert engine.last is not None
    found: dict[str, list[int]] = engine.last.scheduled_encoder_inputs
    return found


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Engine, Engine]:
    """Two engines whose schedulers have an encoder, with room for two images."""
    here, there = Engine(engine_config(tmp_path)), Engine(engine_config(tmp_path))
    for engine in (here, there):
        scheduler: Any = engine.scheduler
        scheduler.max_num_encoder_input_tokens = 2 * NUM_IMAGE_TOKENS
        scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=2 * NUM_IMAGE_TOKENS)
    return here, there


def same(one: MultiModalFeatureSpec, other: MultiModalFeatureSpec) -> bool:
    here: Any = one.data
    there: Any = other.data
    return (
        (one.identifier, one.mm_hash, one.modality, one.mm_position)
        == (other.identifier, other.mm_hash, other.modality, other.mm_position)
        and here.keys() == there.keys()
        and all(
            here[k].data.dtype == there[k].data.dtype
            and torch.equal(here[k].data, there[k].data)
            and here[k].field == there[k].field
            for k in here
        )
    )


def test_an_image_is_encoded_again_only_after_a_preemption(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    submit(here, request())
    here.step()
    assert encoded(here) == {"a": [0]}
    here.until("a", 5)
    move("a", here, there)
    there.step()
    assert encoded(there) == {}
    arrived = there.request("a")
    assert same(arrived.mm_features[0], image())
    assert arrived.block_hashes
    there.until("a", 12)
    assert encoded(there) == {}
    there.reset()
    there.step()
    assert encoded(there) == {"a": [0]}
    there.finish()
    assert there.answers["a"] == answer_of(PROMPT, NUM_TOKENS)
    here.finish()
    assert here.scheduler.encoder_cache_manager.num_freeable_slots == 2 * NUM_IMAGE_TOKENS


def test_blocks_have_the_names_that_they_had(pair: tuple[Engine, Engine]) -> None:
    """Names of blocks depend on the image, as the prefix cache must."""
    here, there = pair
    submit(here, request())
    here.until("a", 5)
    names = list(here.request("a").block_hashes)
    move("a", here, there)
    assert there.request("a").block_hashes[: len(names)] == names
    without = there.preprocess_add_request(
        msgspec.structs.replace(request("b"), mm_features=None, prompt_token_ids=[*PROMPT, 1])
    )[0]
    assert without.block_hashes[0] != names[0]


def test_a_waiting_request_takes_its_image_along(pair: tuple[Engine, Engine]) -> None:
    here, there = pair
    for name in ("b", "c"):
        here.submit(name, [1, 2, 3], 12)
    submit(here, request())
    here.step()
    assert here.request("a") not in here.scheduler.running
    move("a", here, there)
    there.step()
    assert encoded(there) == {"a": [0]}
    assert same(there.request("a").mm_features[0], image())
    for engine in pair:
        engine.finish()
    assert there.answers["a"] == answer_of(PROMPT, NUM_TOKENS)


def test_with_the_image_left_out(
    pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a preemption at the destination nothing would stand for it."""
    real = state.capture_request

    def without(*arguments: Any, **keywords: Any) -> RequestState:
        captured = real(*arguments, **keywords)
        carried = msgspec.structs.replace(decode_request(captured), mm_features=None)
        return msgspec.structs.replace(captured, request=state.encode_request(carried))

    monkeypatch.setattr(exports, "capture_request", without)
    here, there = pair
    submit(here, request())
    here.until("a", 5)
    move("a", here, there)
    there.until("a", 12)
    there.reset()
    there.step()
    assert encoded(there) == {}


def test_an_image_whose_data_is_elsewhere_stays(pair: tuple[Engine, Engine]) -> None:
    here, _ = pair
    submit(here, request("a", image(pixels=None)))
    here.until("a", 2)
    with pytest.raises(CannotMigrate, match="in a cache of its engine") as refused:
        here.port.start_export("a")
    assert refused.value.refusal is Refusal.MULTIMODAL
    assert here.port.candidates() == []


def test_an_image_that_is_too_large_stays(
    pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = pair
    submit(here, request())
    here.until("a", 2)
    monkeypatch.setattr(state, "MAX_STATE_NUM_BYTES", 1000)
    with pytest.raises(CannotMigrate, match="is the most that moves") as refused:
        here.port.start_export("a")
    assert refused.value.refusal is Refusal.MULTIMODAL
    here.finish()
    assert here.answers["a"] == answer_of(PROMPT, NUM_TOKENS)


def test_a_request_with_an_image_outlives_its_instance() -> None:
    asked = request()
    assert why_not_resumable(asked) is None
    carried = decode_request(state_to_resume(asked, [4, 5], placement_number=3))
    assert carried.mm_features is not None
    assert same(carried.mm_features[0], image())
    assert "is gone" in (why_not_resumable(request("a", image(pixels=None))) or "")
