"""The admin API: what the pool is doing, moving a request, draining and scaling by hand.

Routes under ``/llumsched``, in vLLM's own app. Errors have OpenAI's shape; a request or an
instance that does not exist is 404, what cannot be done now is 409, and nothing is lost by
either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol, Self

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from llumsched.core.events import MigrationOutcome
from llumsched.frontend.http.live import LiveFeed, live_router
from llumsched.frontend.routing.routes import Routes
from llumsched.frontend.routing.scheduler_client import SchedulerClient, SchedulerUnavailable
from llumsched.frontend.routing.status import RequestStatus
from llumsched.pool.frontend_supervisor import FrontendStatus
from llumsched.pool.instance_supervisor import InstanceSlotStatus
from llumsched.wire.names import frontend_id, instance_name

MIGRATION_TIMEOUT_S = 120.0
DESCRIBE_TIMEOUT_S = 5.0
# Of what the scheduler says of itself.
TOLD = (
    *("policy", "scheduler_age_s", "instances", "migrations", "queued", "policy_failures"),
    *("num_finished_requests", "num_output_tokens"),
)
OTHERS_SILENT = "Another frontend did not say in time which requests it has."


class MigrationBody(BaseModel):
    """Body of ``POST /llumsched/migrations``: a request, or a session."""

    model_config = ConfigDict(extra="forbid")

    request_id: str | None = None
    session_id: str | None = None
    destination: str | None = None

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.request_id is None) == (self.session_id is None):
            raise ValueError("give request_id or session_id, one of the two")
        return self


class DrainBody(BaseModel):
    """Body of ``POST /llumsched/instances/{instance_id}/drain``, which may be left out."""

    model_config = ConfigDict(extra="forbid")

    deadline_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    replace: bool = False


class ScaleBody(BaseModel):
    """Body of ``POST /llumsched/scale``."""

    model_config = ConfigDict(extra="forbid")

    num_instances: int = Field(ge=0)


class InstanceSlots(Protocol):
    """Owner of the instances' lives."""

    @property
    def max_instances(self) -> int: ...

    def describe(self) -> Sequence[InstanceSlotStatus]: ...

    def replace(self, instance_id: str) -> None: ...

    def limit(self, num_instances: int) -> None: ...


class OtherFrontends(Protocol):
    """Other frontends of the same instances."""

    def frontends(self) -> Sequence[FrontendStatus]:
        """Every place of a frontend, this one's too; none if there is but one."""

    async def requests(self) -> Sequence[RequestStatus]:
        """Unfinished requests of the others; raises ``TimeoutError`` if one does not answer."""


class Alone:
    """There are no others."""

    def frontends(self) -> Sequence[FrontendStatus]:
        return ()

    async def requests(self) -> Sequence[RequestStatus]:
        return ()


def requests_of(routes: Routes, frontend: str) -> Iterator[RequestStatus]:
    """The unfinished requests of one frontend."""
    for request_id, route in routes:
        yield RequestStatus(
            request_id=request_id,
            external_id=route.external_id,
            frontend_id=frontend,
            instance_id=instance_name(route.instance) if route.instance is not None else None,
            num_output_tokens=route.num_tokens,
            num_moves=route.num_moves,
            num_resumptions=route.num_resumptions,
            num_prompt_tokens=route.num_prompt_tokens,
            priority_class=route.priority_class,
        )


async def all_requests(
    routes: Routes, frontend: str, others: OtherFrontends
) -> list[RequestStatus]:
    """The unfinished requests of every frontend.

    Raises:
        TimeoutError: if one of the others does not answer.
    """
    return [*requests_of(routes, frontend), *await others.requests()]


def named(name: str, requests: Sequence[RequestStatus]) -> list[str]:
    """The ids of the requests that an operator's name stands for.

    An id that is exactly this goes before those that only begin with it, as ``cmpl-1`` does for
    the ``cmpl-1-0`` and ``cmpl-1-1`` that one call has become.
    """
    exact = [r.request_id for r in requests if r.request_id == name]
    given = [r.request_id for r in requests if r.external_id == name]
    parts = [r.request_id for r in requests if r.external_id.startswith(f"{name}-")]
    return exact or given or parts


def admin_router(
    link: SchedulerClient,
    routes: Routes,
    berths: InstanceSlots,
    others: OtherFrontends | None = None,
    frontend: str = frontend_id(0),
    config_file: str | None = None,
    live: LiveFeed | None = None,
) -> APIRouter:
    """The routes.

    Args:
        routes: the requests of this frontend.
        others: those beside it, if there are several.
        frontend: this one's name.
        config_file: the scheduler's configuration, if it is not that of a bundle alone.
        live: the frames of the live page, if it is served.
    """
    others = others or Alone()
    router = APIRouter(prefix="/llumsched", tags=["llumsched"])

    @router.get("/instances", responses=_errors(503))
    async def list_instances() -> JSONResponse:
        """Every instance: state, freeness, blocks, requests, step time, age of its report."""
        try:
            cluster = await link.describe(DESCRIBE_TIMEOUT_S)
        except SchedulerUnavailable as error:
            return _error(503, str(error))
        described = msgspec.to_builtins(cluster)
        answer = {key: described[key] for key in TOLD}
        answer["config_file"] = config_file
        answer["berths"] = [asdict(berth) for berth in berths.describe()]
        answer["frontends"] = [asdict(status) for status in others.frontends()]
        return JSONResponse(answer)

    @router.post(
        "/instances/{instance_id}/drain", status_code=202, responses=_errors(400, 404, 409, 503)
    )
    async def drain(instance_id: str, body: DrainBody | None = None) -> JSONResponse:
        """Empty an instance and end it; answers when this has begun."""
        body = body or DrainBody()
        running = [b.instance_id for b in berths.describe() if b.state == "running"]
        if instance_id not in running:
            known = ", ".join(sorted(running))
            return _error(404, f"No instance '{instance_id}' is running. There are: {known}.")
        if body.replace:
            berths.replace(instance_id)
        try:
            accepted = await link.drain(instance_id, body.deadline_s, DESCRIBE_TIMEOUT_S)
        except SchedulerUnavailable as error:
            return _error(503, str(error))
        if accepted.refused is not None:
            return _error(409, f"Not drained: {accepted.refused}.")
        return JSONResponse({"instance_id": instance_id, "replace": body.replace}, 202)

    @router.post("/scale", status_code=202, responses=_errors(400, 409, 503))
    async def scale(body: ScaleBody) -> JSONResponse:
        """Have this many instances; answers when this has begun."""
        if body.num_instances > berths.max_instances:
            return _error(
                409,
                f"This server runs at most {berths.max_instances} instances; start it with more "
                "--instances, or a larger max_instances in its configuration.",
            )
        try:
            await link.scale(body.num_instances, DESCRIBE_TIMEOUT_S)
        except SchedulerUnavailable as error:
            return _error(503, str(error))
        # The scheduler does not know of those that are to come in the place of dead ones.
        berths.limit(body.num_instances)
        return JSONResponse({"num_instances": body.num_instances}, 202)

    @router.get("/requests", responses=_errors(503))
    async def list_requests() -> JSONResponse:
        """Every unfinished request, and the frontend and the instance that have it now."""
        try:
            found = await all_requests(routes, frontend, others)
        except TimeoutError:
            return _error(503, OTHERS_SILENT)
        return JSONResponse({"requests": msgspec.to_builtins(found)})

    @router.get("/requests/{request_id}/trace", responses=_errors(404, 503))
    async def trace(request_id: str) -> JSONResponse:
        """A request's history, step by step, while the scheduler remembers it."""
        try:
            traced = await link.trace(request_id, DESCRIBE_TIMEOUT_S)
        except SchedulerUnavailable as error:
            return _error(503, str(error))
        if not traced.requests:
            return _error(404, f"The scheduler remembers no request '{request_id}'.")
        return JSONResponse({"requests": msgspec.to_builtins(traced.requests)})

    async def find(name: str) -> str | JSONResponse:
        try:
            found = await all_requests(routes, frontend, others)
        except TimeoutError:
            return _error(503, OTHERS_SILENT)
        matches = named(name, found)
        if not matches:
            return _error(
                404, f"No unfinished request '{name}'. GET /llumsched/requests lists them."
            )
        if len(matches) > 1:
            return _error(
                409,
                f"'{name}' stands for {len(matches)} sequences; name one: "
                f"{', '.join(sorted(matches))}.",
            )
        return matches[0]

    @router.post("/migrations", responses=_errors(400, 404, 409, 503))
    async def migrate(body: MigrationBody) -> JSONResponse:
        """Move a running request, or the KV of an idle session; answers when it has moved, with
        what it took."""
        request_id = ""
        if body.request_id is not None:
            one = await find(body.request_id)
            if isinstance(one, JSONResponse):
                return one
            request_id = one
        known = sorted(b.instance_id for b in berths.describe() if b.state == "running")
        if body.destination is not None and body.destination not in known:
            return _error(404, f"No instance '{body.destination}'. There are: {', '.join(known)}.")
        try:
            answer = await link.migrate(
                request_id, body.destination, MIGRATION_TIMEOUT_S, body.session_id
            )
        except SchedulerUnavailable as error:
            return _error(503, str(error))
        if answer.refused is not None:
            return _error(409, f"Not migrated: {answer.refused}.")
        assert answer.report is not None
        if answer.report.outcome != MigrationOutcome.COMMITTED:
            return _error(409, f"Not migrated: {answer.report.reason}.")
        return JSONResponse(_flat(msgspec.to_builtins(answer.report)))

    if live is not None:
        router.include_router(live_router(live))
    return router


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How a route describes what it answers besides."""
    return {status: {"model": ErrorResponse} for status in statuses}


def _flat(report: dict[str, Any]) -> dict[str, Any]:
    report.pop("type", None)
    statistics = report.pop("statistics", None) or {}
    return report | statistics


def _error(status: int, message: str) -> JSONResponse:
    kind = {404: "NotFoundError", 409: "ConflictError"}.get(status, "ServiceUnavailableError")
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status
    )
