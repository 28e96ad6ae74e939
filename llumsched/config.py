"""The configuration of the scheduler: which bundle, which parts and parameters are different.

Invariant: a `Config` names only what differs from the defaults in the code, so there is one place
for each default. It does not hold policies: `plugins.build_bundle` makes new ones each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_POLICY = "latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartConfig:
    """One part of a bundle: another policy (`name`), or other parameters for the bundle's own."""

    name: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a configuration file says."""

    policy: str = DEFAULT_POLICY
    seed: int = 0
    parts: Mapping[str, PartConfig | None] = field(default_factory=dict)
    """Part of the bundle -> what is different; None leaves the part out."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Changed `SchedulerOptions`."""

    @classmethod
    def default(cls, policy: str = DEFAULT_POLICY) -> Config:
        """A bundle, or dispatch policy, as it ships."""
        return cls(policy=policy)
