"""llama.cpp's servers behind the proxy, all of them real and none of them vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.servers import Server
from tests.llama_cpp import SLOT_TOKENS, write_model

pytest.importorskip("xllamacpp", reason="llama.cpp's server is of the package xllamacpp")

MODEL = "tiny"
# The server's own words: greedy, and no end before so many tokens.
ASKED = {"model": MODEL, "prompt": "one,two,", "temperature": 0, "ignore_eos": True}
# More than is computed between a first token and a kill.
NUM_TOKENS = 1_000
MOST_TOKENS = SLOT_TOKENS - 64
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama.cpp") / "tiny.gguf"
    write_model(path)
    return path


class Served:
    """Two servers of llama.cpp and a proxy before them."""

    def __init__(self, model_file: Path, folder: Path, stack: ExitStack, *flags: str) -> None:
        self.engines = [
            Server(name, ["tests.llama_cpp", str(model_file), MODEL], folder)
            for name in ("first", "second")
        ]
        backends = [f"--backend={engine.url}" for engine in self.engines]
        arguments = ["llumsched", "serve", *backends, "--policy=least_requests", *flags]
        self.proxy = Server("proxy", [*arguments, "--host=127.0.0.1"], folder)
        for server in (*self.engines, self.proxy):
            stack.callback(server.end)
        for engine in self.engines:
            engine.await_health()
        self.proxy.await_health()
        self.proxy.await_that(
            lambda: [i["state"] for i in self.instances()] == ["serving"] * 2, "both are found"
        )

    def instances(self) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.proxy.url}/llumsched/instances", timeout=TIMEOUT_S)
        found: list[dict[str, Any]] = answer.json()["instances"]
        return found

    def num_running(self) -> int:
        """Requests that the servers say they compute."""
        return sum(instance["load"]["num_running"] for instance in self.instances())


@pytest.fixture(scope="module")
def served(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(model_file, tmp_path_factory.mktemp("served"), stack)


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """Objects that a stream tells, up to its end."""
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def text_of(told: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in told for choice in event.get("choices", ()))


def whole_text(server: Server, num_tokens: int) -> str:
    body = {**ASKED, "max_tokens": num_tokens}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
    text: str = answer.raise_for_status().json()["choices"][0]["text"]
    return text


def killed_meanwhile(served: Served) -> list[dict[str, Any]]:
    """The events of a stream whose server dies after the first of them."""
    body = {**ASKED, "stream": True, "max_tokens": NUM_TOKENS}
    url = f"{served.proxy.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as answer:
        home = answer.headers["x-llumsched-instance"]
        told = events(answer)
        first = next(told)
        next(engine for engine in served.engines if engine.url.endswith(home)).kill()
        return [first, *told]


def test_an_answer_is_llama_cpps_own(served: Served) -> None:
    assert {instance["engine"] for instance in served.instances()} == {"llama.cpp"}
    assert whole_text(served.proxy, 64) == whole_text(served.engines[0], 64)


def test_its_load_is_what_its_metrics_say(served: Served) -> None:
    body = {**ASKED, "stream": True, "max_tokens": MOST_TOKENS}
    url = f"{served.proxy.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as answer:
        # Whoever drops the iterator ends the stream.
        told = events(answer)
        next(told)
        served.proxy.await_that(lambda: served.num_running() == 1, "the stream is seen")
    served.proxy.await_that(lambda: served.num_running() == 0, "its client has left")


def test_a_stream_ends_with_an_error_where_its_server_dies(served: Served) -> None:
    told = killed_meanwhile(served)
    assert "error" in told[-1]
    assert len(whole_text(served.proxy, 8)) == 8


def test_a_stream_goes_on_at_the_other_where_that_is_wanted(
    model_file: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        served = Served(model_file, tmp_path, stack, "--continue-streams")
        text = text_of(killed_meanwhile(served))
        assert len(text) == NUM_TOKENS
        assert text == whole_text(served.proxy, NUM_TOKENS)
