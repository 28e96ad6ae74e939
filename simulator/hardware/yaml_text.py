"""A hardware file as YAML, as `hardware` reads it. Where one comes from is not known here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from llumsched.simulator.hardware.spec import Hardware


class _Point(list[float]):
    """A point of a table: written on one line."""


class _Dumper(yaml.SafeDumper):
    """Block style, but for points."""


_Dumper.add_representer(
    _Point,
    lambda dumper, point: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", point, flow_style=True
    ),
)


def plain_text(content: Mapping[str, Any]) -> str:
    """Keys and values of a hardware file, in their order, as its text."""
    step = dict(content["step"])
    if "table" in step:
        step["table"] = [_Point(point) for point in step["table"]]
    return yaml.dump({**content, "step": step}, Dumper=_Dumper, sort_keys=False, width=98)


def hardware_text(hardware: Hardware) -> str:
    """A file that loads as this; what has its default is left out."""
    return plain_text(_plain(hardware))


def _plain(value: Any) -> dict[str, Any]:
    """Fields that are not at their defaults, by name."""
    content: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        if found == field.default:
            continue
        if dataclasses.is_dataclass(found):
            content[field.name] = _plain(found)
        elif isinstance(found, tuple):
            content[field.name] = [list(x) if isinstance(x, tuple) else x for x in found]
        else:
            content[field.name] = found
    return content
