"""With an API key, every path wants it but those that probes and scrapers read."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm.entrypoints.serve.middleware import authenticate
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from llumsched.frontend.http.api_keys import OPEN, guard

KEY = {"Authorization": "Bearer right"}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    # Restored afterwards: the list is vLLM's, of the whole process.
    monkeypatch.setattr(authenticate, "GUARDED_PREFIX", authenticate.GUARDED_PREFIX)
    app = FastAPI()

    def answer() -> str:
        return "in"

    for path in (
        "/v1/models",
        "/llumsched/instances",
        "/llumsched/instances/{instance_id}/drain",
        "/invocations",
        "/tokenize",
        *sorted(OPEN - {"/openapi.json", "/docs", "/redoc", "/docs/oauth2-redirect"}),
    ):
        app.add_api_route(path, answer, methods=["GET", "POST"])
    app.add_middleware(AuthenticationMiddleware, tokens=["right", "also right"])
    guard(app)
    return TestClient(app)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/llumsched/instances",
        "/llumsched/instances/instance-0/drain",
        "/invocations",
        "/tokenize",
    ],
)
def test_what_wants_the_key(client: TestClient, path: str) -> None:
    for refused in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
        assert client.get(path, headers=refused).status_code == 401
        assert client.post(path, headers=refused, content=b"x").status_code == 401
    assert client.get(path, headers=KEY).status_code == 200
    assert client.get(path, headers={"Authorization": "bearer also right"}).status_code == 200


@pytest.mark.parametrize("path", sorted(OPEN - {"/docs/oauth2-redirect"}))
def test_what_does_not(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200
