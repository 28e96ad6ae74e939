"""Questions to an instance that serves are answered meanwhile."""

from __future__ import annotations

import inspect

import pytest

from llumsched.instance.actor import WHILE_SERVING, Instance


@pytest.mark.parametrize("method", [Instance.abort_client, Instance.leave, Instance.stop])
def test_a_call_does_not_wait_for_the_end_of_the_one_that_serves(method: object) -> None:
    """To Ray a class with a coroutine is an asyncio actor: all calls share a thread, but for those
    of another group."""
    assert inspect.iscoroutinefunction(Instance._run_llumlet)
    assert getattr(method, "__ray_concurrency_group__", None) == WHILE_SERVING
