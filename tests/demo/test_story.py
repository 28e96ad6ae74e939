"""The demo's numbers fit together: its chats are a load for the policy as it ships, and fit."""

from __future__ import annotations

import math

import pytest

from llumsched.policies.freeness_pairs import FreenessPairs
from scripts.demo import act_by_policy, story
from scripts.demo.__main__ import FLAGS
from scripts.demo.client import Answer

NUM_BLOCKS = 52
BLOCK_SIZE = 32
# SmolLM2 has between 1.2 and 1.4 tokens a word of this text, and a template of about 35.
TOKENS_A_WORD = (1.15, 1.45)
TEMPLATE_NUM_TOKENS = 40


def blocks(num_words: int, num_output_tokens: int, tokens_a_word: float) -> int:
    return math.ceil(
        (num_words * tokens_a_word + TEMPLATE_NUM_TOKENS + num_output_tokens) / BLOCK_SIZE
    )


def test_the_flags_say_what_the_numbers_are() -> None:
    assert f"--num-gpu-blocks-override {NUM_BLOCKS + 1}" in FLAGS
    assert f"--block-size {BLOCK_SIZE}" in FLAGS
    assert f"--max-model-len {NUM_BLOCKS * BLOCK_SIZE}" in FLAGS


@pytest.mark.parametrize("tokens_a_word", TOKENS_A_WORD)
def test_four_chats_are_too_many_for_one_instance_and_two_are_not(tokens_a_word: float) -> None:
    policy = FreenessPairs()

    def freeness(num_chats: int, num_output_tokens: int) -> float:
        each = blocks(story.PASSAGE_NUM_WORDS, num_output_tokens, tokens_a_word)
        return (NUM_BLOCKS - num_chats * each) / num_chats

    begun, ended = act_by_policy.HANG_UP_AT_TOKEN, act_by_policy.MAX_TOKENS
    assert freeness(4, begun) < policy.source_below, "four crowd an instance from the start"
    assert freeness(3, ended // 2) < policy.source_below, "three do before they end"
    assert freeness(1, ended // 2) > policy.destination_above, "there is room beside one"
    assert freeness(2, ended) > policy.source_below, "two are left alone"


def test_the_chats_begin_differently() -> None:
    passages = story.passages()
    assert len(passages) == story.NUM_PASSAGES
    assert len({" ".join(passage.split()[:8]) for passage in passages}) == len(passages)
    last = [passage.split()[: story.PASSAGE_NUM_WORDS] for passage in passages][-1]
    assert len(last) == story.PASSAGE_NUM_WORDS, "the text is long enough for the last one"


def test_a_pause_is_the_gap_before_the_first_token_after_the_move() -> None:
    answer = Answer(
        text="abcd", token_ids=[1, 2, 3, 4], times_s=[0.0, 0.1, 0.4, 0.5], ends=[1, 2, 3, 4]
    )
    assert answer.gap_s(2) == pytest.approx(0.3)
    assert answer.step_s() == pytest.approx(0.1)
    assert (answer.text_of(0), answer.text_of(2)) == ("", "ab")
