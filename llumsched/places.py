"""Places of instances, in sentences: for an operator who wonders where an instance is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def place_lines(places: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on places where instances boot, have died, or are on several machines.

    Args:
        places: the ``berths`` of ``GET /llumsched/instances``.
    """
    lines = []
    nodes = {place["node"] for place in places} - {None}
    for place in places:
        parts = []
        if len(nodes) > 1 and place["node"] is not None:
            parts.append(f"on {place['node']}")
        if place["state"] == "booting":
            parts.append("booting")
        if place["num_deaths"]:
            parts.append(f"{place['num_deaths']} died in this place ({place['last_failure']})")
        if place["retry_in_s"] is not None:
            parts.append(f"another is started in {place['retry_in_s']:.0f} s")
        if parts:
            lines.append(f"{place['instance_id']}: {'; '.join(parts)}")
    return lines
