"""The served profile, made from the times at which tokens of a server of known steps come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from benchmarks import _served_profile
from benchmarks._servers import Server
from benchmarks._streams import Stream
from llumsched.core.step_time import MeasuredStep
from llumsched.simulator.hardware.spec import MachineSharing

SERVER = Server(url="http://nowhere", model="none", pid=0)
STEP_S, PROMPT_TOKEN_S, SLOWDOWN = 0.020, 0.001, 0.25
_SLOWED_UNTIL = 3
"""Where the other instance is asked for one token, only so many steps are slow."""


class KnownServer:
    """Two instances that take turns; each token of an answer is one step after the one before.

    Nothing is waited for: an answer is there at once, with the times at which it would have come.
    """

    def __init__(self) -> None:
        self.num_asked = 0
        self.lengths: list[int] = []
        self.prompts: list[int] = []
        self.now_s = 100.0

    async def read(
        self, _: Any, server: Server, prompt: list[int], stream: Stream, num_tokens: int
    ) -> None:
        assert server is SERVER
        self.num_asked += 1
        self.lengths.append(num_tokens)
        self.prompts.append(len(prompt))
        await asyncio.sleep(0)
        # Whoever comes together is known only once all have been asked.
        beside_is_busy = min(self.lengths) > 1
        stream.asked_s = self.now_s
        time_s = self.now_s + STEP_S + PROMPT_TOKEN_S * len(prompt)
        for number in range(num_tokens):
            stream.times_s.append(time_s)
            slow = beside_is_busy or number < _SLOWED_UNTIL - 1
            time_s += STEP_S * (1 + SLOWDOWN if slow else 1)
        stream.take_in([])


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> KnownServer:
    server = KnownServer()
    monkeypatch.setattr(_served_profile, "read", server.read)
    monkeypatch.setattr(_served_profile, "_APART_S", 0.0)
    monkeypatch.setattr(_served_profile, "_ABORTED_AFTER_S", 0.0)
    return server


def served() -> _served_profile._Served:
    return _served_profile._Served(None, SERVER, 2)  # type: ignore[arg-type]


def test_a_batch_is_asked_of_every_instance_and_its_step_is_the_gap(known: KnownServer) -> None:
    step = asyncio.run(served().batch([32, 96, 200]))
    assert known.num_asked == 6
    assert step.num_decodes == 3
    assert step.num_skew_tokens == 3 * 200 - 328
    assert step.seconds == pytest.approx(STEP_S * (1 + SLOWDOWN))
    # The longest prompt is the last to decode: from then until the first answer ends.
    assert 328 < step.num_kv_tokens < 328 + 3 * 38


def test_beside_an_idle_instance_only_one_decodes(known: KnownServer) -> None:
    step = asyncio.run(served().batch([32] * 4, on_one=True))
    assert known.lengths == [40, 1] * 4
    assert step.num_decodes == 4
    assert step.seconds == pytest.approx(STEP_S)
    assert 4 * 32 < step.num_kv_tokens < 4 * (32 + 40)


def test_a_prompt_beside_decodes_is_on_the_instance_that_does_not(known: KnownServer) -> None:
    asyncio.run(served().prompt_beside_decodes(256, 2))
    # By turns: what decodes, and last the one before the prompt, on the first instance.
    assert known.lengths == [200, 1, 200, 1, 1, 2]
    assert known.prompts[-1] == 256


def test_a_step_is_told_as_it_would_be_beside_an_idle_instance() -> None:
    machine = MachineSharing(num_instances=2, decodes_by_decodes=0.3, prompts_by_prompts=0.075)
    decode, prompt = (
        MeasuredStep(
            num_prefill_tokens=num_tokens,
            num_pairs=0,
            num_decodes=1,
            num_kv_tokens=0,
            num_skew_tokens=0,
            seconds=1.0,
        )
        for num_tokens in (0, 16)
    )
    assert _served_profile.undisturbed(decode, machine).seconds == pytest.approx(1 / 1.3)
    assert _served_profile.undisturbed(prompt, machine).seconds == pytest.approx(1 / 1.075)


def test_the_step_of_a_prompt_is_the_time_to_its_token(known: KnownServer) -> None:
    step = asyncio.run(served().prompt(128))
    assert known.num_asked == 2
    assert (step.num_prefill_tokens, step.num_decodes) == (128, 0)
    assert step.num_pairs == 128 * 129 // 2
    assert step.seconds == pytest.approx(STEP_S + 128 * PROMPT_TOKEN_S)


def test_long_steps_are_those_between_the_moments_that_exceed_the_usual() -> None:
    gaps = [0.02] * 10 + [0.09, 0.02, 0.06, 0.02]
    times, now = [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    stream = Stream(times_s=times)
    ends = dict(zip(times, gaps, strict=True))
    joined_s = times[9] - 0.005
    assert _served_profile._long_steps(stream, joined_s, joined_s + 0.05) == [
        pytest.approx(ends[times[10]])
    ]
    assert len(_served_profile._long_steps(stream, joined_s, times[12])) == 2
