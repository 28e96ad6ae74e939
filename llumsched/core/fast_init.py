"""Frozen values that are made by the million: a dataclass, with an `__init__` of half the time.

A frozen dataclass writes each field by a call of `object.__setattr__`, since its own refuses; for
one of eighteen fields that takes longer than what the scheduler then does with it. Here a new value
is for the time of its `__init__` of a twin class, which has the same slots and refuses nothing, so
that each field is one plain assignment.

Invariant: whoever has the value finds it frozen, with the signature, defaults, equality and
pickling of the dataclass. This module does not know which values those are.
"""

from dataclasses import MISSING, fields
from typing import Any, TypeVar

T = TypeVar("T")


def fast_init(cls: type[T]) -> type[T]:
    """Decorates a dataclass that is frozen, has slots and takes keywords only.

    Raises:
        TypeError: a field has a default factory, or the class a `__post_init__` or a base.
    """
    of_class: Any = cls
    known = fields(of_class)
    if (
        cls.__bases__ != (object,)
        or hasattr(cls, "__post_init__")
        or any(field.default_factory is not MISSING for field in known)
    ):
        raise TypeError(f"{cls.__name__} needs the __init__ that dataclass gave it")
    twin = type(f"Open{cls.__name__}", (), {"__slots__": tuple(field.name for field in known)})
    names = {"_frozen": cls, "_twin": twin, "_set": object.__setattr__}
    parameters = []
    for field in known:
        if field.default is MISSING:
            parameters.append(field.name)
        else:
            names[f"_default_{field.name}"] = field.default
            parameters.append(f"{field.name}=_default_{field.name}")
    lines = [
        f"def __init__(self, *, {', '.join(parameters)}):",
        "_set(self, '__class__', _twin)",
        *(f"self.{field.name} = {field.name}" for field in known),
        "self.__class__ = _frozen",
    ]
    exec("\n    ".join(lines), names)
    init: Any = names["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = cls.__init__.__annotations__
    of_class.__init__ = init
    return cls
