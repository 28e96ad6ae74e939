"""Checks that a policy's answer has the shape its protocol asks for.

Invariant: these checks never raise, whatever a policy answered; what passes them can be used
without further care. Whether an answer makes sense in this cluster is for the asking part to judge.
"""

import functools
import inspect
import itertools
import operator
import types
import typing
from collections.abc import Callable, Iterable
from traceback import walk_tb
from typing import Any

from llumsched.core.actions import PolicyFailed

MOST_FRAMES = 20
"""Innermost frames that a report keeps: enough to find the fault, also of an endless recursion."""


def malformed(answer: object, *kinds: type) -> str | None:
    """Mistake in the shape of an answer that should be one of `kinds`, or None."""
    kind: Any = type(answer)
    if kind not in kinds:
        return f"answered {answer!r}, not {' or '.join(k.__name__ for k in kinds)}"
    values, right = _shapes(kind)
    if tuple(map(type, values(answer))) in right:
        return None
    for name, accepted in _fields(kind):
        value = getattr(answer, name)
        if type(value) not in accepted:
            return f"answered a {kind.__name__} whose {name} is {value!r}"
    return None


@functools.cache
def _shapes(kind: Any) -> tuple[Callable[[object], Iterable[object]], frozenset[tuple[type, ...]]]:
    """How to read the values of all fields, and the types that they may have together."""
    fields = _fields(kind)
    names = [name for name, _ in fields]
    values = (
        operator.attrgetter(*names) if len(names) > 1 else lambda a: [getattr(a, n) for n in names]
    )
    return values, frozenset(itertools.product(*(accepted for _, accepted in fields)))


def _fields(kind: Any) -> tuple[tuple[str, frozenset[type]], ...]:
    hints = typing.get_type_hints(kind)
    return tuple((name, _accepted(hints[name])) for name in inspect.signature(kind).parameters)


def _accepted(hint: Any) -> frozenset[type]:
    union = isinstance(hint, types.UnionType)
    accepted = set(typing.get_args(hint)) if union else {hint}
    if float in accepted:
        accepted.add(int)
    return frozenset(accepted)


def policy_failed(policy: object, error: object) -> PolicyFailed:
    """The report of a failed policy; an exception is given with its type and where it came from."""
    name = type(policy).__qualname__
    if not isinstance(error, Exception):
        return PolicyFailed(policy=name, error=str(error))
    frames = [] if error.__traceback__ is None else list(walk_tb(error.__traceback__.tb_next))
    return PolicyFailed(
        policy=name,
        error=f"{type(error).__name__}: {error}",
        frames=tuple(
            (frame.f_code.co_filename, line, frame.f_code.co_name)
            for frame, line in frames[-MOST_FRAMES:]
        ),
    )
