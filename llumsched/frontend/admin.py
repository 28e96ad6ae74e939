"""The admin API: what the pool is doing, and moving a request by hand.

Routes under ``/llumsched``, in vLLM's own app. Errors have OpenAI's shape; a request or an
instance that does not exist is 404, what cannot be done now is 409, and nothing is lost by
either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from llumsched.core.events import MigrationOutcome
from llumsched.frontend.link import SchedulerLink, SchedulerUnavailable
from llumsched.frontend.routes import Routes

MIGRATION_TIMEOUT_S = 120.0
DESCRIBE_TIMEOUT_S = 5.0


class MigrationBody(BaseModel):
    """Body of ``POST /llumsched/migrations``."""

    model_config = ConfigDict(extra="forbid")

    request_id: str
    destination: str | None = None


def admin_router(link: SchedulerLink, routes: Routes, instance_ids: Mapping[int, str]) -> APIRouter:
    """The routes. ``instance_ids`` names each engine index."""
    router = APIRouter(prefix="/llumsched", tags=["llumsched"])

    @router.get("/instances")
    async def list_instances() -> JSONResponse:
        """Every instance: state, freeness, blocks, requests, step time, age of its report."""
        try:
            cluster = await link.describe(DESCRIBE_TIMEOUT_S)
        except SchedulerUnavailable as error:
            return _error(503, str(error))
        described = msgspec.to_builtins(cluster)
        return JSONResponse({key: described[key] for key in ("policy", "instances", "migrations")})

    @router.get("/requests")
    async def list_requests() -> JSONResponse:
        """Every unfinished request of this frontend and the instance that runs it now."""
        return JSONResponse(
            {
                "requests": [
                    {
                        "request_id": request_id,
                        "external_id": route.external_id,
                        "instance_id": instance_ids.get(route.instance)
                        if route.instance is not None
                        else None,
                        "num_output_tokens": route.num_tokens,
                        "num_moves": route.num_moves,
                    }
                    for request_id, route in routes
                ]
            }
        )

    @router.post("/migrations")
    async def migrate(body: MigrationBody) -> JSONResponse:
        """Move a running request; answers when it has moved, with what it took."""
        matches = [
            request_id
            for request_id, route in routes
            if body.request_id in (request_id, route.external_id)
            or route.external_id.startswith(f"{body.request_id}-")
        ]
        if not matches:
            return _error(
                404,
                f"No unfinished request '{body.request_id}'. GET /llumsched/requests lists them.",
            )
        if len(matches) > 1:
            return _error(
                409,
                f"'{body.request_id}' stands for {len(matches)} sequences; name one: "
                f"{', '.join(sorted(matches))}.",
            )
        known = sorted(instance_ids.values())
        if body.destination is not None and body.destination not in known:
            return _error(404, f"No instance '{body.destination}'. There are: {', '.join(known)}.")
        try:
            answer = await link.migrate(matches[0], body.destination, MIGRATION_TIMEOUT_S)
        except SchedulerUnavailable as error:
            return _error(503, str(error))
        if answer.refused is not None:
            return _error(409, f"Not migrated: {answer.refused}.")
        assert answer.report is not None
        if answer.report.outcome != MigrationOutcome.COMMITTED:
            return _error(409, f"Not migrated: {answer.report.reason}.")
        return JSONResponse(_flat(msgspec.to_builtins(answer.report)))

    return router


def _flat(report: dict[str, Any]) -> dict[str, Any]:
    report.pop("type", None)
    statistics = report.pop("statistics", None) or {}
    return report | statistics


def _error(status: int, message: str) -> JSONResponse:
    kind = {404: "NotFoundError", 409: "ConflictError"}.get(status, "ServiceUnavailableError")
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status
    )
