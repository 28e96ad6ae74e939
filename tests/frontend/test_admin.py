"""The admin API of one frontend of several: all requests of the pool can be seen and moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from llumsched.frontend.http.admin import OtherFrontends, admin_router, named
from llumsched.frontend.routing.routes import Routes
from llumsched.frontend.routing.scheduler_client import SchedulerClient
from llumsched.frontend.routing.status import RequestStatus
from llumsched.pool.frontend_supervisor import FrontendStatus
from llumsched.pool.instance_supervisor import InstanceSlotStatus
from llumsched.wire.control import MigrateAnswer
from tests.builders import migration_report


class InstanceSlots:
    """No instance."""

    max_instances = 8

    def describe(self) -> Sequence[InstanceSlotStatus]:
        return ()

    def replace(self, instance_id: str) -> None: ...

    def limit(self, num_instances: int) -> None: ...


class Others:
    """One other frontend, with one request; or one that does not answer."""

    def __init__(self, *, answers: bool = True) -> None:
        self._answers = answers

    def frontends(self) -> Sequence[FrontendStatus]:
        return ()

    async def requests(self) -> Sequence[RequestStatus]:
        if not self._answers:
            raise TimeoutError
        theirs = RequestStatus(
            request_id="cmpl-2-0-abcd",
            external_id="cmpl-2-0",
            frontend_id="frontend-1",
            instance_id="instance-1",
            num_output_tokens=5,
            num_moves=1,
            num_resumptions=0,
        )
        return [theirs]


def status_of(external_id: str) -> RequestStatus:
    return RequestStatus(
        request_id=f"{external_id}-abcd",
        external_id=external_id,
        frontend_id="frontend-0",
        instance_id="instance-0",
        num_output_tokens=5,
        num_moves=0,
        num_resumptions=0,
    )


def test_an_exact_id_goes_before_those_that_begin_with_it() -> None:
    requests = [status_of(i) for i in ("job-1", "job", "job-10", "cmpl-7-0", "cmpl-7-1")]
    assert named("job", requests) == ["job-abcd"]
    assert named("job-1", requests) == ["job-1-abcd"]
    assert named("job-1-abcd", requests) == ["job-1-abcd"]
    assert named("cmpl-7", requests) == ["cmpl-7-0-abcd", "cmpl-7-1-abcd"]
    assert named("jo", requests) == []


class PeerConnection:
    """Moves whatever it is told to move."""

    async def migrate(
        self, request_id: str, destination: str | None, _: float, session_id: str | None = None
    ) -> MigrateAnswer:
        report = migration_report(
            request_id=request_id or f"last of {session_id}",
            source="instance-1",
            destination=destination or "instance-0",
            has_ended=session_id is not None,
        )
        return MigrateAnswer(call_id=1, report=report)


def client(others: OtherFrontends | None) -> TestClient:
    routes = Routes()
    routes.open("cmpl-1-0-efgh", "cmpl-1-0").instance = 0
    app = FastAPI()
    app.include_router(
        admin_router(cast(SchedulerClient, PeerConnection()), routes, InstanceSlots(), others)
    )
    return TestClient(app)


def test_requests_of_all_frontends_are_listed() -> None:
    found = client(Others()).get("/llumsched/requests").json()["requests"]
    assert [(r["external_id"], r["frontend_id"], r["instance_id"]) for r in found] == [
        ("cmpl-1-0", "frontend-0", "instance-0"),
        ("cmpl-2-0", "frontend-1", "instance-1"),
    ]


def test_a_request_of_another_frontend_is_moved() -> None:
    answer = client(Others()).post("/llumsched/migrations", json={"request_id": "cmpl-2"})
    assert answer.status_code == 200
    assert answer.json()["request_id"] == "cmpl-2-0-abcd"


def test_a_request_is_not_said_to_be_nowhere_while_a_frontend_is_silent() -> None:
    silent = client(Others(answers=False))
    answers = [
        silent.get("/llumsched/requests"),
        silent.post("/llumsched/migrations", json={"request_id": "cmpl-2"}),
    ]
    assert [answer.status_code for answer in answers] == [503, 503]


def test_a_session_moves_though_no_request_of_it_is_left() -> None:
    asked = {"session_id": "s"}
    answer = client(Others()).post("/llumsched/migrations", json=asked)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["request_id"], told["has_ended"]) == ("last of s", True)


@pytest.mark.parametrize("body", [{}, {"request_id": "r", "session_id": "s"}])
def test_what_moves_is_named_once(body: dict[str, str]) -> None:
    assert client(None).post("/llumsched/migrations", json=body).status_code in (400, 422)


def test_one_frontend_has_no_others() -> None:
    alone = client(None)
    assert len(alone.get("/llumsched/requests").json()["requests"]) == 1
    assert alone.post("/llumsched/migrations", json={"request_id": "x"}).status_code == 404
