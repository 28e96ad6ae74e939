"""Which paths of the HTTP server want the API key.

vLLM checks it, in constant time and before a body is read, for a list of prefixes. That list leaves
out paths that run the model or change the server. Here every path wants the key but those that say
whether the server is well and what it offers. Without a key, no path does.
"""

from __future__ import annotations

import argparse
from typing import Any

import vllm.envs as envs
from fastapi import FastAPI
from vllm.entrypoints.serve.middleware import authenticate

# What probes and scrapers read, and the description of the API.
OPEN = frozenset(
    {
        "/health",
        "/ping",
        "/load",
        "/version",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        # A page without data; what it then asks for wants the key.
        "/llumsched/",
    }
)


def num_keys(args: argparse.Namespace) -> int:
    """How many API keys the server has, by flag or by environment."""
    return len({key for key in args.api_key or [envs.VLLM_API_KEY] if key})


def guard(app: FastAPI) -> None:
    """Have every route of the app but those ask for the key; call when it has all of them."""
    paths = {getattr(route, "path", "").partition("{")[0] for route in app.routes}
    prefixes = {*authenticate.GUARDED_PREFIX, *paths} - OPEN - {""}
    middleware: Any = authenticate
    middleware.GUARDED_PREFIX = tuple(sorted(prefixes))
