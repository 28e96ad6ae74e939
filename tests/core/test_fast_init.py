"""Values that are quick to make are otherwise those of a frozen dataclass."""

import copy
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, replace
from inspect import signature

import pytest

from llumsched.core.fast_init import fast_init
from llumsched.core.load import InstanceLoad


@fast_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    x: int
    y: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    x: int
    y: int = 2


def test_it_is_frozen_once_it_is_made() -> None:
    point = Point(x=1)
    assert type(point) is Point
    assert (point.x, point.y) == (1, 2)
    with pytest.raises(FrozenInstanceError):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        del point.x


def test_it_is_called_as_the_dataclass_is() -> None:
    assert signature(Point) == signature(Plain)
    for wrong in ({}, {"x": 1, "z": 2}):
        with pytest.raises(TypeError, match=r"Point\.__init__\(\)"):
            Point(**wrong)
    with pytest.raises(TypeError):
        Point(1)  # type: ignore[call-arg]


def test_it_is_equal_hashed_shown_and_copied_as_the_dataclass_is() -> None:
    point = Point(x=1, y=5)
    assert point == Point(x=1, y=5) != Point(x=1)
    assert hash(point) == hash(Plain(x=1, y=5))
    assert repr(point) == "Point(x=1, y=5)"
    assert replace(point, x=4) == Point(x=4, y=5)
    for again in (pickle.loads(pickle.dumps(point)), copy.copy(point), copy.deepcopy(point)):
        assert again == point
        assert type(again) is Point


def test_values_of_the_core_are_quick_and_frozen() -> None:
    load = InstanceLoad(instance_id="a", sequence=1, num_total_blocks=4, num_free_blocks=3)
    assert load.num_used_blocks == 1
    with pytest.raises(FrozenInstanceError):
        load.num_free_blocks = 4  # type: ignore[misc]


def test_a_class_that_its_init_would_not_do_for_is_refused() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class WithFactory:
        items: list[int] = field(default_factory=list)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Checked:
        x: int

        def __post_init__(self) -> None:
            raise AssertionError

    @dataclass(frozen=True, slots=True, kw_only=True)
    class WithBase(Plain):
        z: int

    for kind in (WithFactory, Checked, WithBase):
        with pytest.raises(TypeError, match=kind.__name__):
            fast_init(kind)
