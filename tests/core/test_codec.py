"""Every event and action survives JSON, and nothing else gets in."""

from __future__ import annotations

import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.core import actions, events
from llumsched.core.codec import CodecError, decode, decode_action, decode_event, encode
from tests.core.builders import make_load, make_request

EVENTS = typing.get_args(events.Event)
ACTIONS = typing.get_args(actions.Action)


@st.composite
def values(draw: st.DrawFn) -> object:
    kind = draw(st.sampled_from(EVENTS + ACTIONS))
    with_floats = {float: st.floats(allow_nan=False, allow_infinity=False)}
    for type_, strategy in with_floats.items():
        st.register_type_strategy(type_, strategy)
    return draw(st.from_type(kind))


@pytest.mark.slow
@given(values())
def test_a_round_trip_through_json_changes_nothing(value: object) -> None:
    assert decode(json.loads(json.dumps(encode(value), allow_nan=False))) == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected an object with a 'type'"),
        ({"type": "Nothing"}, "unknown type 'Nothing'; known: DispatchRequest"),
        ({"type": "Ticked", "at": 1}, "Ticked: unknown key 'at'"),
        (
            {"type": "RequestFinished"},
            "RequestFinished: .* missing required field `request_id`",
        ),
        (
            {"type": "RequestFinished", "request_id": 1},
            r"got `int` - at `\$.request_id`",
        ),
        (
            {"type": "KvBlocksStored", "instance_id": "a", "block_hashes": [1, "x"]},
            r"Expected `int`, got `str` - at `\$.block_hashes\[1\]`",
        ),
        (
            {"type": "ScaleRequested", "num_instances": True},
            r"Expected `int`, got `bool` - at `\$.num_instances`",
        ),
        (
            {
                "type": "MigrationFinished",
                "migration_id": "m1",
                "request_id": None,
                "source": "a",
                "destination": "b",
                "outcome": "lost",
            },
            r"Invalid enum value 'lost' - at `\$.outcome`",
        ),
    ],
)
def test_what_is_not_an_event_is_an_error_that_names_it(data: object, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode(data)


def test_a_missing_optional_field_takes_its_default() -> None:
    encoded = encode(events.RequestArrived(request=make_request()))
    del encoded["request"]["client_id"]
    assert decode(encoded) == events.RequestArrived(request=make_request())


def test_events_and_actions_are_not_taken_for_each_other() -> None:
    with pytest.raises(CodecError, match="is an event, expected an action"):
        decode_action(encode(events.LoadReported(load=make_load())))
    with pytest.raises(CodecError, match="is an action, expected an event"):
        decode_event(encode(actions.RefuseMigration(request_id="r", reason="no")))
    with pytest.raises(CodecError, match="not an event or action"):
        encode(make_load())
