"""Events, actions and their values as plain JSON-able dicts, and back.

`{"type": "LoadReported", "load": {...}}`. `to_plain` and `from_plain` do the same for a value whose
type the reader knows.

Invariant: `decode(encode(value)) == value`, and decoding is strict: an unknown type or key, a
missing key or a wrong type is a `CodecError` that names it. This module does not write files.
"""

import typing
from typing import Any

import msgspec

from llumsched.core import actions, events

T = typing.TypeVar("T")


class CodecError(ValueError):
    """The data is not an encoded event or action."""


_TYPES: dict[str, type] = {
    cls.__name__: cls for cls in (*typing.get_args(events.Event), *typing.get_args(actions.Action))
}


def encode(value: Any) -> dict[str, Any]:
    """An event or action as a dict of JSON values."""
    name = type(value).__name__
    if _TYPES.get(name) is not type(value):
        raise CodecError(f"not an event or action: {value!r}")
    return {"type": name, **to_plain(value)}


def decode(data: Any) -> Any:
    """The event or action that `encode` gave `data` for."""
    if not isinstance(data, dict):
        raise CodecError(f"expected an object with a 'type', not {data!r}")
    name = data.get("type")
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise CodecError(f"unknown type {name!r}; known: {', '.join(sorted(_TYPES))}")
    return from_plain(cls, {key: value for key, value in data.items() if key != "type"})


def decode_event(data: Any) -> events.Event:
    """`decode`, for an event only."""
    value = decode(data)
    if not isinstance(value, typing.get_args(events.Event)):
        raise CodecError(f"{type(value).__name__} is an action, expected an event")
    return typing.cast(events.Event, value)


def decode_action(data: Any) -> actions.Action:
    """`decode`, for an action only."""
    value = decode(data)
    if not isinstance(value, typing.get_args(actions.Action)):
        raise CodecError(f"{type(value).__name__} is an event, expected an action")
    return typing.cast(actions.Action, value)


def from_plain(kind: type[T], data: Any) -> T:
    """The value of type `kind` that `to_plain` gave `data` for."""
    try:
        value = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise CodecError(f"{kind.__name__}: {error}") from None
    _check_known(data, to_plain(value), kind.__name__)
    return value


def to_plain(value: Any) -> Any:
    """A value of dataclasses, structs, tuples, enums and scalars as JSON values."""
    return msgspec.to_builtins(value)


def _check_known(data: Any, known: Any, path: str) -> None:
    """Every key of `data` is one of `known`, which the value that came of it has."""
    if isinstance(data, dict):
        for key, inner in data.items():
            if key not in known:
                raise CodecError(f"{path}: unknown key {key!r}; known: {', '.join(known)}")
            _check_known(inner, known[key], f"{path}.{key}")
    elif isinstance(data, list | tuple):
        for i, inner in enumerate(data):
            _check_known(inner, known[i], f"{path}[{i}]")
