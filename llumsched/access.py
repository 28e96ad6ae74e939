"""Access to the admin API, by the flags of either front door.

Invariant: unless an operator says otherwise, nobody beyond this machine reaches it, and where that
leaves the operators' commands without it, or leaves it without a key, a sentence says so.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Literal

AdminApi = Literal["auto", "on", "off"]
# vLLM's own.
API_KEY_VARIABLE = "VLLM_API_KEY"


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a server that listens on ``host``."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def serves_admin_api(choice: AdminApi, *, is_local: bool) -> bool:
    """True if the flag ``--admin-api`` means that the API is served.

    Args:
        is_local: nobody beyond this machine reaches the server.
    """
    return is_local if choice == "auto" else choice == "on"


def warning_of(choice: AdminApi, *, is_local: bool, has_keys: bool, address: str) -> str | None:
    """A sentence for an operator who may expect otherwise, or none.

    Args:
        has_keys: the server has an API key, which the admin API wants as well.
        address: where the server listens.
    """
    if is_local:
        return None
    if choice == "auto":
        return (
            f"{address} can be reached from other machines, so it serves no admin API: 'llumsched"
            " status', 'drain' and 'scale' do not work. To have them, give --admin-api on and"
            " --api-key KEY."
        )
    if choice == "on" and not has_keys:
        return (
            f"Whoever reaches {address} may use the admin API, and so end instances and send"
            " prompts elsewhere: give --api-key as well."
        )
    return None
