"""Scheduling hints that a client gives with its request, in HTTP headers.

| header | value | means |
|---|---|---|
| `X-Request-Priority` | `high`, `normal`, `low` | its class, whatever `priority` in the body says |
| `X-SLO-TTFT-Ms` | milliseconds | the client wants its first token within this |
| `X-SLO-TPOT-Ms` | milliseconds | the client wants further tokens this far apart |
| `X-Client-Id` | any text | whose request it is; else the API key's digest |
| `X-Session-Id` | any text | the conversation that it belongs to |

With several API keys a client is whoever has one: a header of its own choice cannot make it many.
The session is the conversation that the request is a turn of; see `SESSION_NAMES` for the headers
by which agents name it. This module does not know what a policy makes of them, nor how they get
from HTTP to the scheduler.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from llumsched.core.types import PriorityClass

PRIORITY = b"x-request-priority"
TTFT_SLO = b"x-slo-ttft-ms"
TPOT_SLO = b"x-slo-tpot-ms"
CLIENT_ID = b"x-client-id"
AUTHORIZATION = b"authorization"
MAX_CLIENT_ID_LENGTH = 128
SESSION_NAMES = (
    *(b"x-session-id", b"session-id", b"session_id", b"x-session-affinity", b"x-opencode-session"),
    *(b"x-amp-thread-id", b"x-claude-code-session-id", b"x-litellm-session-id"),
    *(b"helicone-session-id", b"x-conversation-id"),
)
"""Headers that name a session, the first that is there counts: ours, Codex' and others'."""
MAX_SESSION_ID_LENGTH = 256
"""Characters of a session's name that tell it from others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingHints:
    """``priority`` is ``None`` where the request's body decides."""

    priority: PriorityClass | None = None
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    client_id: str | None = None
    session_id: str | None = None


NO_HINTS = SchedulingHints()


def parse(
    headers: Iterable[tuple[bytes, bytes]], *, key_names_client: bool = False
) -> SchedulingHints:
    """The hints in a request's headers, whose names are in lower case.

    Args:
        key_names_client: its API key says whose a request is, whatever a header does.

    Raises:
        ValueError: a header that is ours says something else; the message names the fix.
    """
    found = {name: value for name, value in headers if name in _NAMES}
    if not found:
        return NO_HINTS
    texts = {name: value.decode("latin-1").strip() for name, value in found.items()}
    priority = texts.get(PRIORITY)
    try:
        priority_class = PriorityClass.parse(priority) if priority is not None else None
    except ValueError as error:
        raise ValueError(f"X-Request-Priority: {error}") from None
    return SchedulingHints(
        priority=priority_class,
        ttft_slo_s=_seconds("X-SLO-TTFT-Ms", texts.get(TTFT_SLO)),
        tpot_slo_s=_seconds("X-SLO-TPOT-Ms", texts.get(TPOT_SLO)),
        client_id=_client_id(texts, key_names_client),
        session_id=session_name(next(filter(None, map(texts.get, SESSION_NAMES)), None)),
    )


def session_name(text: str | None) -> str | None:
    """A session's name as the scheduler keeps it; None without one."""
    return text[:MAX_SESSION_ID_LENGTH] if text else None


def _seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not (math.isfinite(milliseconds) and milliseconds > 0):
        raise ValueError(f"{name}: {text!r} is not a positive number of milliseconds")
    return milliseconds / 1000


def _client_id(texts: dict[bytes, str], key_names_client: bool) -> str | None:
    authorization, client_id = texts.get(AUTHORIZATION), texts.get(CLIENT_ID)
    if client_id and len(client_id) > MAX_CLIENT_ID_LENGTH:
        raise ValueError(f"X-Client-Id: longer than {MAX_CLIENT_ID_LENGTH} characters")
    if client_id and not (key_names_client and authorization):
        return client_id
    if authorization:
        # Not the scheme before it, which may be spelled in many ways.
        key = authorization.partition(" ")[2] or authorization
        # The key itself must not reach logs.
        return hashlib.sha256(key.encode()).hexdigest()[:16]
    return None


_NAMES = frozenset({PRIORITY, TTFT_SLO, TPOT_SLO, CLIENT_ID, AUTHORIZATION, *SESSION_NAMES})
