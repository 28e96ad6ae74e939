"""Breaking this process's connections while both ends live."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection

import psutil


def shut_connections_to(ports: Collection[int], at_most: int | None = None) -> None:
    """Shut connections to these ports; whoever made them may make them again."""
    connections = psutil.Process().net_connections("tcp")
    for fd in [c.fd for c in connections if getattr(c.raddr, "port", None) in ports][:at_most]:
        with socket.socket(fileno=os.dup(fd)) as connection:
            connection.shutdown(socket.SHUT_RDWR)
