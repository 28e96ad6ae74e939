"""Clients of a world of the model, as they and the frontend see their requests.

Knows neither instances nor what may happen to them (`world`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Violation(AssertionError):
    """An invariant does not hold."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Violation(message)


class _ErrorsAreViolations(logging.Handler):
    """Errors that a host logs, of its own or of the other's, must not happen."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            raise Violation(record.getMessage()) from (record.exc_info or (None, None))[1]


@contextmanager
def errors_are_violations() -> Iterator[None]:
    logger = logging.getLogger("llumsched.migration")
    handler = _ErrorsAreViolations()
    logger.addHandler(handler)
    logger.propagate, before = False, logger.propagate
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


@dataclass(slots=True, kw_only=True)
class Client:
    """A request as its client and the frontend see it."""

    request_id: str
    expected: list[int]
    believed_at: str
    believed_order: tuple[int, int] = (0, 0)
    tokens: list[int] = field(default_factory=list)
    repeats_allowed: bool = False
    abort_sent: bool = False
    is_pursued: bool = False
    """The frontend is gone: the abort goes round until it has met the request, once."""
    may_be_lost: bool = False

    @property
    def finished(self) -> bool:
        return len(self.tokens) == len(self.expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Tells the frontend where a request is now."""

    request_id: str
    instance_id: str
    order: tuple[int, int]
