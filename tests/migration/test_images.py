"""A model with images, of random weights: its requests move, and are computed again, with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.distributed import parallel_state

from tests.migration.answers import seen_by_client
from tests.migration.cases import params
from tests.migration.leaving_out import capturing
from tests.migration.pool import Pool
from tests.migration.test_waiting import preempt
from tests.models import IMAGE_SIZE, with_images

# Which images: by their seeds.
ONE, OTHER = (1, 2), (3, 2)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    model = with_images(tmp_path_factory.mktemp("images"))
    parallel_state.destroy_model_parallel()
    with Pool(model, limit_mm_per_prompt={"image": 2}) as pool:
        assert pool.instances[0].port.refusal is None
        yield pool


@pytest.fixture
def pool(engines: Pool) -> Iterator[Pool]:
    engines.recover()
    forget(engines)
    yield engines
    engines.settle()


def forget(pool: Pool) -> None:
    """Neither KV nor what the encoder has put out is known any more."""
    pool.forget_everything()
    for instance in pool.instances:
        instance.core.reset_encoder_cache()


def image(seed: int) -> Image.Image:
    chance = np.random.default_rng(seed)
    pixels = chance.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(pool: Pool, seeds: Sequence[int]) -> str:
    token: int = pool.tokenizer.convert_tokens_to_ids("<image>")
    prompt = [504, 600, token, 700, 701, token, 702, 800]
    images = [image(seed) for seed in seeds]
    fields: dict[str, Any] = {"multi_modal_data": {"image": images}}
    (sequence_id,) = pool.submit("r", prompt, params(logprobs=2), **fields).sequence_ids
    return sequence_id


def answer(pool: Pool) -> Any:
    (output,) = pool.finish("r")
    pool.settle()
    return seen_by_client(output)


@pytest.fixture(scope="module")
def unmoved(engines: Pool) -> Any:
    ask(engines, ONE)
    return answer(engines)


def test_another_image_has_another_answer(pool: Pool, unmoved: Any) -> None:
    ask(pool, OTHER)
    assert answer(pool)["choices"] != unmoved["choices"]


def test_there_and_back(pool: Pool, unmoved: Any) -> None:
    sequence_id = ask(pool, ONE)
    for number, to in enumerate((1, 0)):
        pool.until(lambda n=number: pool.num_tokens("r") >= 3 + 8 * n)  # type: ignore[misc]
        assert pool.move(sequence_id, to).outcome == "committed"
    assert answer(pool) == unmoved


@pytest.mark.parametrize("when", ["before", "after"])
def test_preempted(pool: Pool, unmoved: Any, when: str) -> None:
    """The destination encodes the images, which it has never seen."""
    sequence_id = ask(pool, ONE)
    pool.until(lambda: pool.num_tokens("r") >= 3)
    if when == "before":
        preempt(pool, 0, sequence_id)
        pool.until(lambda: pool.num_tokens("r") >= 6)
    assert pool.move(sequence_id, 1).outcome == "committed"
    if when == "after":
        pool.until(lambda: pool.num_tokens("r") >= 12)
        preempt(pool, 1, sequence_id)
    assert answer(pool) == unmoved


def test_images_left_out(pool: Pool, unmoved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With those of another request in their place, a preemption after the move shows it."""
    other = ask(pool, OTHER)
    features = pool.instances[0].core.scheduler.requests[other].mm_features
    pool.abort("r")
    pool.settle()
    forget(pool)
    capturing(monkeypatch, lambda request: setattr(request, "mm_features", features))
    sequence_id = ask(pool, ONE)
    pool.until(lambda: pool.num_tokens("r") >= 3)
    assert pool.move(sequence_id, 1).outcome == "committed"
    pool.until(lambda: pool.num_tokens("r") >= 12)
    preempt(pool, 1, sequence_id)
    assert answer(pool)["choices"] != unmoved["choices"]
