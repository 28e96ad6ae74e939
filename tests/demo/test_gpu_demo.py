"""The demo for a GPU: what is missing is said, and its load compares, moves and measures."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import time
from typing import Any

import pytest
import torch

from llumsched.commands import CommandError
from scripts import gpu_demo
from scripts.demo import full_batch
from scripts.demo.client import Answer
from scripts.demo.full_batch import Load, Question, Seen, questions
from scripts.demo.screen import Screen
from scripts.demo.stage import Check
from scripts.gpu_demo import SIZES, missing


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """With a GPU, and a PyTorch that cannot use it."""
    monkeypatch.setattr(gpu_demo, "GPU_DEVICES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_a_gpu_is_missing(machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine.setattr(gpu_demo, "GPU_DEVICES", ("/dev/no-such-device",))
    assert gpu_demo.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gpu-demo: this machine has no GPU, or no driver for one;")
    assert said.count("\n") == 1
    assert missing("cpu") is None


def test_a_pytorch_for_gpus_is_missing(machine: pytest.MonkeyPatch) -> None:
    assert f"PyTorch {torch.__version__} cannot use this machine's GPU" in str(missing("gpu"))
    machine.setattr(torch.cuda, "is_available", lambda: True)
    assert missing("gpu") is None
    assert gpu_demo.main(["--check"]) == 0


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_batches_are_full_but_for_a_place_or_two(size: gpu_demo.Size) -> None:
    assert 2 * size.max_num_seqs - 2 <= size.num_streams < 2 * size.max_num_seqs
    asked = questions(size.num_questions)
    assert len(set(asked)) == size.num_questions
    assert {question.seed is None for question in asked} == {True, False}


class Server:
    """Two instances that answer with the numbers from a prompt's length on.

    Args:
        forgets: an answer that has moved is another.
        dies: an instance is replaced while requests move.
    """

    def __init__(self, *, forgets: bool = False, dies: bool = False) -> None:
        self._forgets, self._dies = forgets, dies
        self._ids = (f"r{number}" for number in itertools.count())
        self._running: dict[str, dict[str, Any]] = {}
        self.num_moves = 0

    async def chat(self, prompt: str, *, max_tokens: int, **_: Any) -> Answer:
        answer = Answer(request_id=next(self._ids))
        state = {"external_id": answer.request_id, "num_output_tokens": 0, "num_moves": 0}
        self._running[answer.request_id] = state
        for token in range(max_tokens):
            await asyncio.sleep(0.001)
            wrong = self._forgets and state["num_moves"]
            answer.token_ids.append(-1 if wrong else len(prompt) + token)
            answer.times_s.append(asyncio.get_running_loop().time())
            state["num_output_tokens"] = token + 1
        del self._running[answer.request_id]
        return answer

    def requests(self) -> list[dict[str, Any]]:
        return list(self._running.values())

    def migrate(self, request_id: str) -> dict[str, Any]:
        state = self._running.get(request_id)
        if state is None:
            raise CommandError("No unfinished request.")
        state["num_moves"] += 1
        self.num_moves += 1
        return {"num_output_tokens": state["num_output_tokens"], "suspended_s": 0.001}

    def instances(self) -> dict[str, Any]:
        load = {"num_running": 2, "num_waiting": 1, "num_free_blocks": 1, "num_total_blocks": 1}
        names = ("instance-0", f"instance-{2 if self._dies and self.num_moves else 1}")
        return {"instances": [{"instance_id": name, "load": load} for name in names]}


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the load on a server that is played; what it claims, and what it printed."""

    def run(server: Server, left_s: float = 60.0) -> tuple[list[Check], str]:
        @contextlib.asynccontextmanager
        async def client(_url: str) -> Any:
            yield server

        async def quiet(_stage: Any) -> list[Check]:
            return []

        monkeypatch.setattr(full_batch, "Client", client)
        monkeypatch.setattr(full_batch, "AdminClient", lambda _url: server)
        monkeypatch.setattr(full_batch, "quiet", quiet)
        printed = io.StringIO()
        load = Load(
            max_num_seqs=2,
            num_streams=6,
            num_questions=3,
            max_tokens=20,
            still_s=0.05,
            moving_s=0.3,
            ends_at_s=time.monotonic() + left_s,
        )
        return asyncio.run(load.act(Screen(printed), "")), printed.getvalue()

    return run


def test_what_is_claimed_of_a_pool_that_works(play: Any) -> None:
    server = Server()
    checks, printed = play(server)
    assert [check.holds for check in checks] == [True] * 4, checks
    assert f"{server.num_moves} moves, of" in checks[1].text
    assert "(2 requests, up to 2 more waiting)" in checks[2].text
    assert "a moved request stood still for" in printed
    assert "1.0 ms (median), 1.0 ms (99 %)" in printed


def test_a_demo_that_is_late_still_compares_every_answer(play: Any) -> None:
    checks, _ = play(Server(), left_s=full_batch.END_S)
    assert checks[0].holds
    assert checks[0].text.startswith("all 6 answers"), "one for each stream"


def test_an_answer_that_differs_is_noticed(play: Any) -> None:
    checks, _ = play(Server(forgets=True))
    assert not checks[0].holds
    assert "differ)" in checks[0].text


def test_an_instance_that_dies_is_noticed(play: Any) -> None:
    checks, _ = play(Server(dies=True))
    assert [check.holds for check in checks] == [True, True, True, False]


def test_gaps_are_those_before_the_first_move_or_since() -> None:
    answer = Answer(token_ids=[1, 2, 3, 4], times_s=[0.0, 1.0, 3.0, 6.0])
    report = {"num_output_tokens": 2, "suspended_s": 0.5}
    seen = Seen(answers={"r1": answer}, moves=[("r1", report)], moving_since_s=2.0)
    assert seen.gaps_s(moving=False) == [1.0]
    assert seen.gaps_s(moving=True) == [2.0, 3.0]
    assert seen.pauses_s() == [2.0]


def test_a_stream_that_breaks_ends_the_demo(play: Any) -> None:
    class Broken(Server):
        async def chat(self, prompt: str, *, max_tokens: int, **options: Any) -> Answer:
            if self.num_moves:
                raise ConnectionError("the stream broke")
            return await super().chat(prompt, max_tokens=max_tokens, **options)

    with pytest.raises(ConnectionError, match="the stream broke"):
        play(Broken())


def test_a_question_is_sampled_if_it_has_a_seed() -> None:
    given: list[tuple[float, int | None]] = []

    class Listening:
        async def chat(
            self, _prompt: str, *, temperature: float, seed: int | None, **_: Any
        ) -> Answer:
            given.append((temperature, seed))
            return Answer()

    for seed in (None, 7):
        question = Question(prompt="", seed=seed)
        asyncio.run(question.ask(Listening(), 4))  # type: ignore[arg-type]
    assert given == [(0.0, None), (0.8, 7)]
