"""The admin API where other machines reach a server: off, or said to be open."""

from __future__ import annotations

import pytest

from llumsched.access import AdminApi, serves_admin_api, warning_of


@pytest.mark.parametrize(
    ("choice", "is_local", "has_keys", "served", "said"),
    [
        ("auto", True, False, True, None),
        ("auto", False, True, False, "so it serves no admin API: 'llumsched status'"),
        ("on", False, False, True, "give --api-key as well"),
        ("on", False, True, True, None),
        ("on", True, False, True, None),
        ("off", False, False, False, None),
    ],
)
def test_an_operator_is_told_what_is_otherwise_than_on_one_machine(
    choice: AdminApi, is_local: bool, has_keys: bool, served: bool, said: str | None
) -> None:
    """In a container `status`, `drain` and `scale` were gone without a word."""
    assert serves_admin_api(choice, is_local=is_local) is served
    warning = warning_of(choice, is_local=is_local, has_keys=has_keys, address="http://0.0.0.0:1")
    if said is None:
        assert warning is None
    else:
        assert warning is not None
        assert said in warning
        assert "http://0.0.0.0:1" in warning
