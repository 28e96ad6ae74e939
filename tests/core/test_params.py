"""Parameters know their docs and limits; a violation names both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import ParamError, check_params, param, params_of


@dataclass(frozen=True)
class Example:
    share: float = param(0.5, "A share.", above=0, at_most=1)
    count: int = param(3, "A count.", at_least=1)
    limit: float | None = param(None, "A limit.", at_least=0)
    mode: str = param("fast", "A mode.", choices=("fast", "slow"))


def test_parameters_are_listed_with_defaults_and_docs() -> None:
    described = [
        (p.name, p.type_name, p.default, p.spec.doc, p.spec.range_text())
        for p in params_of(Example)
    ]
    assert described == [
        ("share", "float", 0.5, "A share.", "above 0, at most 1"),
        ("count", "int", 3, "A count.", "at least 1"),
        ("limit", "float | None", None, "A limit.", "at least 0"),
        ("mode", "str", "fast", "A mode.", "one of fast, slow"),
    ]
    assert params_of(object) == ()


@dataclass
class Unusual:
    needed: str
    made: list[int] = field(default_factory=list)


def test_a_parameter_may_be_required_or_made() -> None:
    needed, made = params_of(Unusual)
    assert (needed.is_required, made.is_required, made.default) == (True, False, [])


@pytest.mark.parametrize(
    "values", [{}, {"share": 1}, {"limit": 2}, {"limit": None}, {"mode": "slow"}]
)
def test_what_is_in_range_is_accepted(values: dict[str, Any]) -> None:
    check_params(Example(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0}, "share must be above 0, at most 1, not 0.0"),
        ({"share": float("nan")}, "share must be above 0, at most 1, not nan"),
        ({"share": "half"}, "share must be float, not str 'half'"),
        ({"count": 1.5}, "count must be int, not float 1.5"),
        ({"count": True}, "count must be int, not bool True"),
        ({"limit": -1}, "limit must be at least 0, not -1.0"),
        ({"mode": "slwo"}, "mode must be one of fast, slow, not 'slwo'"),
    ],
)
def test_what_is_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamError) as error:
        check_params(Example(**values))
    assert str(error.value) == message
    assert error.value.name in values


def test_scheduler_options_check_themselves() -> None:
    with pytest.raises(ParamError, match="migration_interval_s must be above 0"):
        SchedulerOptions(migration_interval_s=0.0)
