"""Replay a decision log: the same scheduler must decide the same, another shows where it parts.

Replaying with another policy answers "what would it have decided, had it seen these events". The
events themselves stay those of the recorded run: what a different choice would have led to (other
load reports, other completions) takes a simulation.

Invariant: replaying under the recorded configuration compares every action, and adds no event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from llumsched.config import Config, build_bundle
from llumsched.core.actions import Action, DispatchRequest, PolicyFailed
from llumsched.core.codec import encode
from llumsched.core.events import Ticked
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.decision_log import Decision, read_segment, segments_of
from llumsched.policy_failures import PolicyFailures

TICK_LATENCY_S = 0.1
"""A recorded tick may come this much after its deadline; until then none is added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One event that was decided otherwise (with another policy: but for the reason)."""

    number: int
    """Which event of the log, from 1."""
    decision: Decision
    replayed: tuple[Action, ...]


@dataclass(slots=True, kw_only=True)
class ReplayResult:
    """How recorded and replayed decisions compare."""

    num_events: int = 0
    num_different: int = 0
    first_differences: list[Difference] = field(default_factory=list)
    recorded: Counter[str] = field(default_factory=Counter)
    """Actions by type."""
    replayed: Counter[str] = field(default_factory=Counter)
    recorded_on: Counter[str] = field(default_factory=Counter)
    """Dispatches by instance."""
    replayed_on: Counter[str] = field(default_factory=Counter)
    recorded_failures: PolicyFailures = field(default_factory=PolicyFailures)
    """Decisions that a policy failed to make; the scheduler made them by itself."""
    replayed_failures: PolicyFailures = field(default_factory=PolicyFailures)
    num_placed_elsewhere: int = 0
    """Requests whose last dispatch went to different instances."""

    @property
    def is_identical(self) -> bool:
        """True if every event was decided alike."""
        return self.num_different == 0


def replay(
    path: Path,
    other: Config | None = None,
    *,
    max_shown: int = 3,
    watch: Callable[[Decision, tuple[Action, ...]], None] | None = None,
) -> ReplayResult:
    """Feed a log (a segment, or a folder of them) to a scheduler and compare.

    Without `other` the scheduler is the recorded one. With it, the scheduler also ticks at its own
    deadlines between the events, since it may want to decide at other times. `watch` is given each
    decision and what it was replayed as.

    Raises:
        DecisionLogError: the log cannot be read.
        PluginError: a policy it names cannot be found.
        ParamError: a parameter it names is not valid any more.
    """
    result = ReplayResult()
    scheduler: GlobalScheduler | None = None
    placed: dict[str, str] = {}
    placed_otherwise: dict[str, str] = {}
    for segment in segments_of(path):
        header, decisions = read_segment(segment)
        if scheduler is None or header.checkpoint is None:
            # The first segment, or one by which a new scheduler began.
            config = other if other is not None else header.config
            scheduler = GlobalScheduler(build_bundle(config), seed=config.seed)
            if header.checkpoint is not None:
                scheduler.restore(header.checkpoint)
        for decision in decisions:
            actions: tuple[Action, ...] = ()
            if other is not None:
                actions = _tick_until(scheduler, decision.now)
            actions += scheduler.handle(decision.event, decision.now)
            result.num_events += 1
            if _compared(actions, other) != _compared(decision.actions, other):
                result.num_different += 1
                if len(result.first_differences) < max_shown:
                    result.first_differences.append(
                        Difference(number=result.num_events, decision=decision, replayed=actions)
                    )
            _count(decision.actions, result.recorded, result.recorded_on, placed)
            _count(actions, result.replayed, result.replayed_on, placed_otherwise)
            _note_failures(decision.actions, result.recorded_failures)
            _note_failures(actions, result.replayed_failures)
            if watch is not None:
                watch(decision, actions)
    result.num_placed_elsewhere = sum(
        placed_otherwise.get(request_id) != instance_id
        for request_id, instance_id in placed.items()
    )
    return result


def _compared(actions: tuple[Action, ...], other: Config | None) -> tuple[object, ...]:
    """The part that has to be equal: everything, or with another policy all but what is said."""
    if other is None:
        return actions
    return tuple(
        action
        if isinstance(action, PolicyFailed)
        else encode(action) | {"reason": "", "allowance": None}
        for action in actions
    )


def _tick_until(scheduler: GlobalScheduler, now: float) -> tuple[Action, ...]:
    """The ticks that the recorded host did not need, because its scheduler had other deadlines."""
    actions: tuple[Action, ...] = ()
    while (deadline := scheduler.next_deadline()) is not None and deadline < now - TICK_LATENCY_S:
        actions += scheduler.handle(Ticked(), deadline)
    return actions


def _note_failures(actions: Iterable[Action], failures: PolicyFailures) -> None:
    for action in actions:
        if isinstance(action, PolicyFailed):
            failures.add(action)


def _count(
    actions: Iterable[Action], by_type: Counter[str], by_instance: Counter[str], on: dict[str, str]
) -> None:
    for action in actions:
        by_type[type(action).__name__] += 1
        if isinstance(action, DispatchRequest):
            by_instance[action.instance_id] += 1
            on[action.request_id] = action.instance_id
