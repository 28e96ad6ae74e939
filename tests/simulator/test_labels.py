"""Two policies never share a column or a file, and none is left out without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.simulator.labels import file_name, labels


def test_a_file_is_called_by_its_stem_while_that_is_its_own() -> None:
    assert labels(["latency", "conf/mine.yaml"]) == ["latency", "mine"]


def test_a_tuned_copy_of_a_policy_is_told_from_the_policy() -> None:
    assert labels(["latency", "latency.yaml"]) == ["latency", "latency.yaml"]


def test_files_of_one_name_are_told_apart_by_their_folders() -> None:
    assert labels(["a/x.yaml", "b/x.yaml"]) == ["a/x.yaml", "b/x.yaml"]


@pytest.mark.parametrize(
    "policies",
    [
        ("latency", "latency"),
        ("a/x.yaml", "./a/x.yaml"),
        ("x.yaml", str(Path("x.yaml").resolve())),
    ],
)
def test_the_same_policy_twice_is_an_error(policies: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="twice: each policy once"):
        labels(policies)


_NAMES = st.text("ab-/.", min_size=1, max_size=8)


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["latency", "a", "b", "a:B"]),
            _NAMES.map(lambda name: f"{name.strip('/.') or 'a'}.yaml"),
        ),
        max_size=6,
        unique_by=lambda policy: str(Path(policy).resolve()),
    )
)
def test_labels_and_file_names_are_always_different(policies: list[str]) -> None:
    named = labels(policies)
    assert len(named) == len(policies)
    assert len(set(named)) == len(set(map(file_name, named))) == len(policies)
