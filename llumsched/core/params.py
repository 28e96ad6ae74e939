"""Documented, range-checked parameters: dataclass fields that carry their own doc and limits.

A policy *is* a dataclass and its fields are its parameters, so the default in the code is the
default in YAML, on the command line and in the docs.

Invariant: `check_params` accepts exactly what `param` describes; a violation names the field, the
range and the value. This module does not know YAML (`llumsched.config`) or any policy.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

_SPEC = "llumsched.param"
LARGEST = 2**1000
"""No parameter is as large; a float takes no whole number much above."""


class ParamError(ValueError):
    """A parameter is outside its range or of the wrong type; `name` is the field."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """Doc and limits of one parameter; `choices` closes a set of strings."""

    doc: str
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] | None = None

    def range_text(self) -> str:
        """The allowed values in words; empty if every value of the type is allowed."""
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        parts = []
        if self.above is not None:
            parts.append(f"above {self.above:g}")
        if self.at_least is not None:
            parts.append(f"at least {self.at_least:g}")
        if self.at_most is not None:
            parts.append(f"at most {self.at_most:g}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter of a policy, as `llumsched policies` shows it."""

    name: str
    type: Any
    default: Any
    spec: ParamSpec

    @property
    def is_required(self) -> bool:
        """True if it has no default: the configuration must give it."""
        return self.default is dataclasses.MISSING

    @property
    def type_name(self) -> str:
        """The type as a reader writes it: `int`, `float | None`."""
        return getattr(self.type, "__name__", None) or str(self.type)


def param(
    default: Any,
    doc: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with its doc and limits."""
    spec = ParamSpec(doc=doc, at_least=at_least, at_most=at_most, above=above, choices=choices)
    return dataclasses.field(default=default, metadata={_SPEC: spec})


def params_of(cls: type) -> tuple[Param, ...]:
    """The parameters of a policy class; a class that is no dataclass has none."""
    return tuple(_params(cls)) if dataclasses.is_dataclass(cls) else ()


def _params(cls: type) -> Iterator[Param]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            spec = field.metadata.get(_SPEC, ParamSpec(doc=""))
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            yield Param(name=field.name, type=hints[field.name], default=default, spec=spec)


def check_param(described: Param, value: Any) -> Any:
    """`value` as the parameter's type (an int where a float is meant becomes one).

    Raises:
        ParamError: wrong type, or outside the range.
    """
    accepted = get_args(described.type) if get_origin(described.type) else (described.type,)
    if float in accepted and type(value) is int and abs(value) < LARGEST:
        value = float(value)
    # bool is an int in Python, but `max_migrations: true` is a mistake in YAML.
    if type(value) not in accepted:
        raise ParamError(
            described.name,
            f"{described.name} must be {described.type_name}, not {type(value).__name__} {value!r}",
        )
    spec = described.spec
    out_of_range = (
        (spec.choices is not None and value not in spec.choices)
        or (spec.at_least is not None and value is not None and not value >= spec.at_least)
        or (spec.at_most is not None and value is not None and not value <= spec.at_most)
        or (spec.above is not None and value is not None and not value > spec.above)
        or (isinstance(value, float) and math.isnan(value))
    )
    if out_of_range:
        allowed = spec.range_text() or "a number"
        raise ParamError(described.name, f"{described.name} must be {allowed}, not {value!r}")
    return value


def check_params(policy: object) -> None:
    """Check every parameter of a built policy; call it from `__post_init__` to check at once."""
    for described in params_of(type(policy)):
        check_param(described, getattr(policy, described.name))
