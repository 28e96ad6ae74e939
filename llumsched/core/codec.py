"""Events, actions and their values as plain JSON-able dicts, and back.

`{"type": "LoadReported", "load": {...}}`. `to_plain` and `from_plain` do the same for a value whose
type the reader knows.

Invariant: `decode(encode(value)) == value`, and decoding is strict: an unknown type or key, a
missing key or a wrong type is a `CodecError` that names it. This module does not write files.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

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
    return _decoder(cls)({key: value for key, value in data.items() if key != "type"}, str(name))


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
    key: Any = kind
    return typing.cast(T, _decoder(key)(data, kind.__name__))


def to_plain(value: Any) -> Any:
    """A value of dataclasses, tuples, enums and scalars as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(getattr(value, name)) for name in _field_names(value.__class__)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value


@cache
def _field_names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


_Decoder = Callable[[Any, str], Any]


@cache
def _decoder(kind: Any) -> _Decoder:
    """A function that turns plain data into a value of type `kind`, or raises naming its path."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_decoder(typing.cast(type, kind))
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
        decoder = _decoder(inner)
        return lambda data, path: None if data is None else decoder(data, path)
    if origin is tuple:
        return _tuple_decoder(typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _enum_decoder(kind)
    return _scalar_decoder(kind)


def _dataclass_decoder(cls: type) -> _Decoder:
    hints = typing.get_type_hints(cls)
    decoders = {field.name: _decoder(hints[field.name]) for field in dataclasses.fields(cls)}
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }

    def decode_fields(data: Any, path: str) -> Any:
        if not isinstance(data, dict):
            raise CodecError(f"{path}: expected an object, not {data!r}")
        unknown = data.keys() - decoders.keys()
        if unknown:
            raise CodecError(f"{path}: unknown key {min(unknown)!r}; known: {', '.join(decoders)}")
        missing = required - data.keys()
        if missing:
            raise CodecError(f"{path}: missing key {min(missing)!r}")
        return cls(**{name: decoders[name](item, f"{path}.{name}") for name, item in data.items()})

    return decode_fields


def _tuple_decoder(args: tuple[Any, ...]) -> _Decoder:
    if args[-1] is Ellipsis:
        item_decoder = _decoder(args[0])

        def decode_items(data: Any, path: str) -> Any:
            if not isinstance(data, list):
                raise CodecError(f"{path}: expected a list, not {data!r}")
            return tuple(item_decoder(item, f"{path}[{i}]") for i, item in enumerate(data))

        return decode_items
    decoders = tuple(_decoder(arg) for arg in args)

    def decode_fixed(data: Any, path: str) -> Any:
        if not isinstance(data, list) or len(data) != len(decoders):
            raise CodecError(f"{path}: expected a list of {len(decoders)}, not {data!r}")
        return tuple(
            decoder(item, f"{path}[{i}]")
            for i, (decoder, item) in enumerate(zip(decoders, data, strict=True))
        )

    return decode_fixed


def _enum_decoder(kind: type[enum.Enum]) -> _Decoder:
    def decode_member(data: Any, path: str) -> Any:
        for member in kind:
            if member.value == data:
                return member
        known = ", ".join(str(member.value) for member in kind)
        raise CodecError(f"{path}: {data!r} is none of {known}")

    return decode_member


def _scalar_decoder(kind: type) -> _Decoder:
    def decode_scalar(data: Any, path: str) -> Any:
        if kind is float and type(data) is int:
            return float(data)
        if type(data) is not kind:
            raise CodecError(f"{path}: expected {kind.__name__}, not {data!r}")
        return data

    return decode_scalar
