"""Record of one migration at the source, and the limits it works within.

Invariant: `num_blocks_copied` blocks are at the destination and will not change at the source.
Knows neither the rules (`rules`) nor the messages' way.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llumsched.core.migration.groups import CacheGroup
from llumsched.core.migration.source.events import MigrationState
from llumsched.core.params import ParamError, check_params, param

# Of a step of the destination: by so much its end may be guessed too late.
EARLY_SHARE = 0.1
# To suspend a request takes up to so many steps of the source; the last stage and the commit are
# quick beside a long step, and take about so long.
SUSPENSION_STEPS = 2.0
LAST_STAGE_S = 0.02

TERMINAL_STATES = frozenset({MigrationState.COMMITTED, MigrationState.ABORTED})


class AbortReason(StrEnum):
    """Why a migration ended without moving the request: few and fixed, fit for a metric's label."""

    RESERVATION_REJECTED = "reservation_rejected"
    REQUEST_FINISHED = "request_finished"
    REQUEST_ABORTED = "request_aborted"
    REQUEST_PREEMPTED = "request_preempted"
    DECODES_FASTER_THAN_LINK = "decodes_faster_than_link"
    DEADLINE_EXPIRED = "deadline_expired"
    PEER_LOST = "peer_lost"
    COMMIT_REFUSED = "commit_refused"


def hand_over_s(step_time_s: float) -> float:
    """About how long a source needs from the order to suspend a request to the commit."""
    return SUSPENSION_STEPS * step_time_s + LAST_STAGE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationOptions:
    """When to stop copying in stages, and how long to wait in each state.

    Numbers of blocks are those of one group of the KV cache; with several, of each.

    Stages go on while more than `final_stage_blocks` full blocks are left, each stage is smaller
    than the one before, and fewer than `max_stages` are done. When they stop with more left than
    that, the request decodes about as fast as the link copies: up to `max_final_stage_blocks` it is
    suspended and moved all the same; beyond, it is left alone.

    An engine answers between two steps, and a step may hold a long prompt: on a CPU that takes
    seconds. Nothing is lost by waiting before the suspension; after it, the request stands still.
    So where the destination's steps are long, the request decodes on at the source until one of
    them is about to end.
    """

    max_stages: int = param(8, "Stages before the last one of a migration.", at_least=1)
    final_stage_blocks: int = param(
        1, "Blocks left at which the request is suspended for the last stage.", at_least=0
    )
    max_final_stage_blocks: int = param(
        8,
        "A request that fills blocks as fast as they are copied is suspended with this many left, "
        "and with more is left alone.",
        at_least=0,
    )
    prefill_timeout_s: float = param(
        30.0, "How long a migration waits for the first token of a long prompt.", above=0
    )
    reserve_timeout_s: float = param(30.0, "How long the destination may take to reserve.", above=0)
    stage_timeout_s: float = param(30.0, "How long a stage may take.", above=0)
    max_step_wait_s: float = param(
        10.0,
        "How long a request may go on decoding at the source until a step of the destination is "
        "about to end; 0: it is suspended at once.",
        at_least=0,
    )
    suspend_timeout_s: float = param(
        30.0, "How long the source may take to the end of the steps in flight.", above=0
    )
    final_stage_timeout_s: float = param(
        10.0, "How long the last stage may take, which the commit waits for.", above=0
    )
    commit_timeout_s: float = param(
        2.0,
        "After this long, and that of a last stage, without an answer to the commit the "
        "destination is asked what it did.",
        above=0,
    )
    query_interval_s: float = param(0.5, "Seconds between two such questions.", above=0)

    def __post_init__(self) -> None:
        check_params(self)
        if self.final_stage_blocks > self.max_final_stage_blocks:
            raise ParamError(
                "final_stage_blocks",
                f"final_stage_blocks={self.final_stage_blocks} must not exceed "
                f"max_final_stage_blocks={self.max_final_stage_blocks}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One request on its way from `source` to `destination`, as the source knows it.

    Blocks are counted from the request's first, over all `groups` in their order: the destination
    holds `num_blocks_copied` of them, those it had cached included, and `num_copyable_blocks` may
    be copied, the tail and what is live only once the request is suspended. `stage` is the number
    of the latest stage begun, 0 before the first, and `num_stage_blocks` its size.
    `step_ends_in_s`, `step_s` and `hand_over_s` are of the destination's last answer.
    """

    migration_id: str
    request_id: str
    source: str
    destination: str
    options: MigrationOptions
    num_preemptions_at_start: int
    num_preemptions: int
    groups: tuple[CacheGroup, ...] = ()
    state: MigrationState = MigrationState.RESERVING
    stage: int = 0
    num_stage_blocks: int = 0
    num_blocks_copied: int = 0
    num_copyable_blocks: int = 0
    step_ends_in_s: float = 0.0
    step_s: float = 0.0
    hand_over_s: float = 0.0
    abort_requested: bool = False
    destination_is_dead: bool = False
    abort_reason: AbortReason | None = None
    abort_detail: str = ""

    @property
    def num_blocks_left(self) -> int:
        """Blocks that can be copied now and are not; a cached prefix may reach beyond them."""
        return max(0, self.num_copyable_blocks - self.num_blocks_copied)

    @property
    def suspend_after_s(self) -> float:
        """Seconds for which the request decodes on, to come as a step of the destination ends.

        It is in the step after that, so whatever is left of the one under way adds to its pause.
        Of two evils it comes early: what comes late waits for a whole step.
        """
        if self.step_s <= 2 * self.hand_over_s:
            return 0.0  # at a moment of chance it waits for half a step: that is no longer
        wait_s = self.step_ends_in_s - self.hand_over_s - EARLY_SHARE * self.step_s
        if wait_s < 0:
            wait_s += self.step_s
        return wait_s if wait_s <= self.options.max_step_wait_s else 0.0

    @property
    def num_settled_groups(self) -> int:
        """Groups whose blocks are copied while the request decodes, of each as many."""
        return max(1, sum(not group.is_live for group in self.groups))

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL_STATES
