"""One thing that is used of vLLM's internals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Internal:
    """``name`` is an attribute of ``where`` (a module, or a class in one), used ``for_what``.

    ``parameters`` are those passed by us; those in ``compat.DROPPABLE`` may be missing.
    ``on_instances`` marks attributes that methods set on ``self``. ``or_where`` are places of
    older versions. ``since`` is the first minor release that has it, where older ones do without.
    """

    where: str
    name: str
    for_what: str
    parameters: tuple[str, ...] = ()
    on_instances: bool = False
    or_where: tuple[str, ...] = ()
    since: str = ""

    @property
    def label(self) -> str:
        return f"{self.where}.{self.name}"


def each(
    where: str, for_what: str, *names: str, or_where: tuple[str, ...] = ()
) -> Iterator[Internal]:
    """Several attributes of one place, all used for the same."""
    return (Internal(where, name, for_what, or_where=or_where) for name in names)
