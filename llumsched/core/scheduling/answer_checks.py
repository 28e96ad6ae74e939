"""Whether a policy's answer has the shape its protocol asks for.

Invariant: these checks never raise, whatever a policy answered; what passes them can be used
without further care. Whether an answer makes sense in this cluster is for the asking part to judge.
"""

import functools
import types
import typing
from typing import Any

from llumsched.core.actions import PolicyFailed


def malformed(answer: object, *kinds: type) -> str | None:
    """What is wrong with the shape of an answer that should be one of `kinds`, or None."""
    kind: Any = type(answer)
    if kind not in kinds:
        return f"answered {answer!r}, not {' or '.join(k.__name__ for k in kinds)}"
    for name, accepted in _fields(kind):
        value = getattr(answer, name)
        if type(value) not in accepted:
            return f"answered a {kind.__name__} whose {name} is {value!r}"
    return None


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, frozenset[type]], ...]:
    hints = typing.get_type_hints(kind)
    return tuple((name, _accepted(hints[name])) for name in kind.__dataclass_fields__)


def _accepted(hint: Any) -> frozenset[type]:
    union = isinstance(hint, types.UnionType)
    accepted = set(typing.get_args(hint)) if union else {hint}
    if float in accepted:
        accepted.add(int)
    return frozenset(accepted)


def policy_failed(policy: object, error: object) -> PolicyFailed:
    """The report of a failed policy; an exception is given with its type."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    return PolicyFailed(policy=type(policy).__qualname__, error=text)
