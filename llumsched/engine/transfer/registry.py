"""Which transport two instances use: the best that the source can offer and the destination accept.

The table of transports is ``core.transfer_options.TRANSPORTS``: names, in the order in which they
are tried, and where the class of each is. A class is imported when its transport is tried, so what
it needs besides torch need not be installed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module

from llumsched.core.transfer_options import AUTO, TRANSPORTS
from llumsched.engine.transfer.transport import Here, Transport, Unavailable

logger = logging.getLogger(__name__)


def transport_class(name: str) -> type[Transport]:
    """The class of a transport.

    Raises:
        Unavailable: if there is no such transport, or if what it needs is not installed.
    """
    if name not in TRANSPORTS:
        raise Unavailable(f"there is no transport {name}; there are {', '.join(TRANSPORTS)}")
    module, _, class_name = TRANSPORTS[name].partition(":")
    try:
        found: type[Transport] = getattr(import_module(module), class_name)
    except ImportError as error:
        raise Unavailable(f"{error.name or error} is not installed") from error
    assert issubclass(found, Transport), f"{TRANSPORTS[name]} is no transport"
    return found


def offered(here: Here, wanted: str) -> dict[str, tuple[Transport, bytes]]:
    """The transports that this instance can send by, best first, each with its offer.

    Args:
        wanted: the one that is configured, or ``auto``.

    Raises:
        Unavailable: if there is none.
    """
    found: dict[str, tuple[Transport, bytes]] = {}
    reasons: list[str] = []
    for name in TRANSPORTS if wanted == AUTO else (wanted,):
        try:
            kind = transport_class(name)
            if wanted == AUTO and not kind.is_automatic:
                continue
            transport = kind(here)
            found[name] = transport, transport.offer()
        except Unavailable as error:
            reasons.append(f"{name}: {error}")
    if not found:
        raise Unavailable("; ".join(reasons))
    return found


async def accepted(here: Here, offers: Mapping[str, bytes]) -> tuple[Transport, bytes]:
    """The first of the offers that this instance can take, and the answer to it.

    Raises:
        Unavailable: if it can take none; the message has a reason for each.
    """
    reasons: list[str] = []
    for name, offer in offers.items():
        try:
            transport = transport_class(name)(here)
            return transport, await transport.accept(offer)
        except Unavailable as error:
            reasons.append(f"{name}: {error}")
    raise Unavailable("; ".join(reasons) or "nothing was offered")
