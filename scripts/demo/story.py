"""Prompts of the demo. The text is the beginning of "Alice's Adventures in Wonderland" (1865)."""

from __future__ import annotations

from pathlib import Path

ALICE = Path(__file__).with_name("alice.txt").read_text(encoding="utf-8")

CHATS = (
    "What is a load balancer? Answer in two sentences.",
    "Who was Ada Lovelace? Answer in two sentences.",
    "What is the capital of France, and what is it known for?",
    "How do bees make honey? Answer briefly.",
)

LONG_PROMPT = f"{ALICE}\n\nWrite the next paragraph of this story."

NUM_PASSAGES = 8
PASSAGE_NUM_WORDS = 165
PASSAGE_STRIDE = 90


def passages() -> list[str]:
    """Prompts of about 235 tokens each, no two of which begin alike."""
    words = ALICE.split()
    starts = [PASSAGE_STRIDE * number for number in range(NUM_PASSAGES)]
    return [
        f"{' '.join(words[start : start + PASSAGE_NUM_WORDS])}\n\nContinue this story."
        for start in starts
    ]
