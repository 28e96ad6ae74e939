"""What an instance is called.

Invariant: no engine index is used twice while a server runs, so neither is a name: an instance that
is started again is another instance, and nothing that was meant for the first reaches the second.
"""

from __future__ import annotations


def instance_name(engine_index: int) -> str:
    """The id of the instance with this engine."""
    return f"instance-{engine_index}"
