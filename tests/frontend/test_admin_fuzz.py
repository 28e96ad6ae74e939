"""The admin API, as it describes itself, over a pool that is not there: every answer is described.

Bodies and paths are Schemathesis's, right and wrong ones. The scheduler answers, refuses and is
silent in turn.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from typing import Any, cast

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from llumsched.frontend.http.admin import admin_router
from llumsched.frontend.request.rejection import RetryAfterMiddleware
from llumsched.frontend.routing.routes import Routes
from llumsched.frontend.routing.scheduler_client import SchedulerClient, SchedulerUnavailable
from llumsched.pool.instance_supervisor import InstanceSlotStatus
from llumsched.wire.control import (
    Accepted,
    ClusterDescription,
    MigrateAnswer,
    RequestTraced,
)
from tests.builders import migration_report
from tests.campaigns import examples

NUM_EXAMPLES = 25
INSTANCE = "instance-0"
REQUEST = "cmpl-1"


class InstanceSlots:
    """One instance, and room for many."""

    max_instances = 1000

    def describe(self) -> list[InstanceSlotStatus]:
        return [
            InstanceSlotStatus(
                instance_id=INSTANCE,
                pid=1,
                state="running",
                num_deaths=0,
                last_failure="",
                retry_in_s=None,
            )
        ]

    def replace(self, instance_id: str) -> None:
        assert instance_id == INSTANCE

    def limit(self, num_instances: int) -> None:
        assert 0 <= num_instances <= self.max_instances


class PeerConnection:
    """A scheduler that agrees, refuses and is silent in turn."""

    def __init__(self) -> None:
        self._moods = itertools.cycle(("agrees", "refuses", "is silent"))

    def _refused(self) -> str | None:
        mood = next(self._moods)
        if mood == "is silent":
            raise SchedulerUnavailable("The global scheduler did not answer within 5 s.")
        return "it does not want to" if mood == "refuses" else None

    async def describe(self, timeout_s: float) -> ClusterDescription:
        self._refused()
        return ClusterDescription(call_id=1, policy="latency", instances=[], migrations={})

    async def trace(self, request_id: str, timeout_s: float) -> RequestTraced:
        self._refused()
        return RequestTraced(call_id=1, requests={REQUEST: []} if request_id == REQUEST else {})

    async def drain(self, instance_id: str, deadline_s: float | None, timeout_s: float) -> Accepted:
        assert instance_id == INSTANCE
        assert deadline_s is None or deadline_s >= 0
        return Accepted(call_id=1, refused=self._refused())

    async def scale(self, num_instances: int, timeout_s: float) -> Accepted:
        assert 0 <= num_instances <= InstanceSlots.max_instances
        return Accepted(call_id=1, refused=self._refused())

    async def migrate(
        self,
        request_id: str,
        destination: str | None,
        timeout_s: float,
        session_id: str | None = None,
    ) -> MigrateAnswer:
        assert (request_id == REQUEST) == (session_id is None)
        refused = self._refused()
        report = migration_report(request_id=request_id, source=INSTANCE, destination="instance-1")
        return MigrateAnswer(call_id=1, refused=refused, report=None if refused else report)


def make_app() -> FastAPI:
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    routes = Routes()
    routes.open(REQUEST, REQUEST)
    app.include_router(
        admin_router(cast("SchedulerClient", PeerConnection()), routes, InstanceSlots())
    )
    init_exception_handler(app)
    app.add_middleware(RetryAfterMiddleware)
    return app


@pytest.mark.slow
def test_every_answer_is_one_that_is_described() -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app())
    statuses: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = cast("Any", result).ok()
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing to get wrong

            @settings(
                max_examples=examples(NUM_EXAMPLES),
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                # The instance and the request that there are, every other time.
                for name, value in {"instance_id": INSTANCE, "request_id": REQUEST}.items():
                    if len((case.path_parameters or {}).get(name, "")) % 2:
                        case.path_parameters[name] = value
                moves = isinstance(case.body, dict) and "migrations" in case.operation.path
                if moves and len(str(case.body)) % 2:
                    case.body = {"request_id": REQUEST}
                response = case.call()
                statuses.setdefault(case.operation.path, set()).add(response.status_code)
                described = case.operation.definition.raw["responses"]
                assert str(response.status_code) in described, (response.status_code, case.body)
                if response.status_code >= 400:
                    said = response.json()
                    # What is no text at all FastAPI refuses itself.
                    if said != {"detail": "There was an error parsing the body"}:
                        assert said["error"]["message"]
                        assert said["error"]["code"] == response.status_code
                if response.status_code == 503:
                    assert "retry-after" in {name.lower() for name in response.headers}

            ask()
    assert statuses == {
        "/llumsched/instances": {200},
        "/llumsched/instances/{instance_id}/drain": {202, 400, 404, 409, 503},
        "/llumsched/scale": {202, 400, 409, 503},
        "/llumsched/requests": {200},
        "/llumsched/requests/{request_id}/trace": {200, 404, 503},
        "/llumsched/migrations": {200, 400, 404, 409, 503},
    }
