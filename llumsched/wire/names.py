"""Names of instances and frontends.

Invariant: no engine index is used twice while a server runs, so neither is a name: an instance that
is started again is another instance, and nothing that was meant for the first reaches the second.
"""

from __future__ import annotations

_PREFIX = "instance-"


def instance_name(engine_index: int) -> str:
    """The id of the instance with this engine."""
    return f"{_PREFIX}{engine_index}"


def engine_index(instance_id: str) -> int:
    """The engine of an instance of this name."""
    return int(instance_id.removeprefix(_PREFIX))


def frontend_id(index: int) -> str:
    """The name of the frontend in a place, whichever process it is."""
    return f"frontend-{index}"
