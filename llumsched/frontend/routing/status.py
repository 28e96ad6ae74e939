"""An unfinished request as the admin API shows it."""

from __future__ import annotations

import msgspec


class RequestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An unfinished request, as ``GET /llumsched/requests`` shows it."""

    request_id: str
    external_id: str
    frontend_id: str
    instance_id: str | None
    num_output_tokens: int
    num_moves: int
    num_resumptions: int
    num_prompt_tokens: int = 0
    priority_class: int = 0
