"""The scheduler's policies, told of requests by real clients and real engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.cases import COMPLETIONS, completion
from tests.e2e.client import Admin, Answer
from tests.e2e.servers import Server

# 6 full blocks of 32 tokens, and a bit.
PREFIX = [600 + i for i in range(200)]


@contextmanager
def running(pool: Admin, prompt: list[int]) -> Iterator[str]:
    """A request that has begun to answer, and the instance that runs it."""
    with pool.stream(COMPLETIONS, completion(prompt=prompt, max_tokens=60)) as stream:
        first = next(stream)
        yield pool.request(first["id"])["instance_id"]
        for _ in stream:
            pass


def test_a_prompt_goes_where_its_prefix_is_cached(pool_apart: Admin) -> None:
    with running(pool_apart, [77] * 40) as busy, running(pool_apart, PREFIX) as cached_at:
        assert cached_at != busy
    # With both at rest, freeness alone would choose the first of them.
    assert cached_at == "instance-1"
    for turn in range(1, 4):
        with running(pool_apart, [*PREFIX, *[900 + turn] * turn]) as instance:
            assert instance == cached_at
    with running(pool_apart, [88] * 40) as elsewhere:
        assert elsewhere != cached_at


def ask(pool: Admin, num_tokens: int, **headers: str) -> Answer:
    """A completion of so many tokens, not streamed."""
    body = completion(model=pool.model, max_tokens=num_tokens)
    del body["stream_options"]
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return pool.post(COMPLETIONS, body, named)


def test_priority_by_header(pool_apart: Admin) -> None:
    before = finished(pool_apart, "high")
    assert ask(pool_apart, 4, x_request_priority="high").status == 200
    assert finished(pool_apart, "high") == before + 1
    assert ask(pool_apart, 4).status == 200
    assert finished(pool_apart, "high") == before + 1


def test_a_priority_that_there_is_not(pool_apart: Admin) -> None:
    answer = ask(pool_apart, 4, x_request_priority="urgent")
    assert answer.status == 400
    assert "low, normal, high" in answer.body["error"]["message"]


def test_lengths_are_predicted_from_those_before(pool_apart: Admin, server_apart: Server) -> None:
    """Read in the decision log, where the prediction goes along with the dispatch."""
    (folder,) = (
        word.partition("=")[2]
        for word in server_apart.arguments
        if word.startswith("--decision-log=")
    )
    (segment,) = Path(folder).glob("*.jsonl")

    def predicted() -> bool:
        # That a request has ended is told to its client before it is told to the scheduler.
        assert ask(pool_apart, 9, x_client_id="a client of its own").status == 200
        return '"predicted_output_tokens":9' in segment.read_text()

    server_apart.await_that(predicted, "logged")


def test_the_pool_in_the_metrics(pool_apart: Admin, server_apart: Server) -> None:
    """The page is of the last time the scheduler was asked, so it comes to be so."""
    at_rest = [
        f'llumsched_instance_blocks{{instance_id="{instance}",kind="free"}} 64.0'
        for instance in ("instance-0", "instance-1")
    ]

    def shown() -> bool:
        metrics = pool_apart.text("/metrics")
        return all(line in metrics for line in at_rest)

    server_apart.await_that(shown, "\n".join(at_rest))
    metrics = pool_apart.text("/metrics")
    assert "llumsched_scheduler_up 1.0" in metrics
    for instance in ("instance-0", "instance-1"):
        assert f'llumsched_instance_freeness{{instance_id="{instance}"}}' in metrics
    assert 'llumsched_queued_requests{priority_class="high"} 0.0' in metrics
    for line in (
        "llumsched_scheduler_starts_total 1.0",
        'llumsched_migrations_total{cause="",outcome="committed",phase="committing"}',
        "llumsched_migration_suspended_seconds_count",
        'llumsched_decision_seconds_bucket{event="RequestArrived",le="0.001"}',
        'llumsched_dispatches_total{policy="prefix_aware"',
        'llumsched_instance_info{engine="0",instance_id="instance-',
    ):
        assert line in metrics, line
    assert "{instance=" not in metrics
    assert ",instance=" not in metrics
    values = [line.split()[-1] for line in metrics.splitlines() if line and line[0] != "#"]
    assert not {"+Inf", "-Inf"} & set(values), "a value is infinite"


def finished(pool: Admin, priority_class: str) -> int:
    labels = f'{{outcome="finished",priority_class="{priority_class}"}}'
    for line in pool.text("/metrics").splitlines():
        if line.startswith(f"llumsched_requests_total{labels}"):
            return int(float(line.split()[-1]))
    return 0
