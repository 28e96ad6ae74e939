"""Errors outside of any route have the shape that OpenAI's clients read."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from llumsched.frontend.http.errors import ErrorShapeMiddleware

KEY = {"Authorization": "Bearer right"}


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    @app.get("/v1/models")
    def stream() -> StreamingResponse:
        return StreamingResponse(iter(["a", "b"]))

    @app.get("/v1/missing")
    def missing() -> JSONResponse:
        return JSONResponse({"error": {"message": "no such model", "code": 404}}, 404)

    init_exception_handler(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["right"])
    app.add_middleware(ErrorShapeMiddleware)
    # vLLM's app is in this state when it is handed over: it takes no handlers any more.
    app.middleware_stack = app.build_middleware_stack()
    return TestClient(app)


def test_a_request_without_the_key(client: TestClient) -> None:
    answer = client.get("/v1/models")
    assert answer.status_code == 401
    assert "API key" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_path_that_does_not_exist(client: TestClient) -> None:
    answer = client.get("/v1/nonsense", headers=KEY)
    assert answer.status_code == 404
    assert answer.json() == {
        "error": {
            "message": "There is no path /v1/nonsense. GET /openapi.json lists them.",
            "type": "NotFoundError",
            "param": None,
            "code": 404,
        }
    }


def test_a_method_that_a_path_does_not_take(client: TestClient) -> None:
    answer = client.post("/v1/models", headers=KEY)
    assert answer.status_code == 405
    assert answer.json()["error"]["message"] == "/v1/models does not take POST."
    assert answer.headers["Allow"] == "GET"


def test_what_is_answered_passes_as_it_is(client: TestClient) -> None:
    assert client.get("/v1/models", headers=KEY).text == "ab"


def test_an_error_that_has_the_shape_passes_as_it_is(client: TestClient) -> None:
    answer = client.get("/v1/missing", headers=KEY)
    assert answer.status_code == 404
    assert answer.json() == {"error": {"message": "no such model", "code": 404}}
