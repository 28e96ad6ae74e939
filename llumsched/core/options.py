"""Settings of the scheduler itself, as opposed to those of a policy.

Invariant: each field's default is the default everywhere.
"""

from dataclasses import dataclass

from llumsched.core.params import ParamError, check_params, param


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Limits and intervals within which every policy's proposals are carried out."""

    max_queued_requests: int = param(
        10_000, "Requests held when no instance takes them; one more is rejected.", at_least=0
    )
    max_queued_per_client: int = param(
        0, "Requests of one client held at a time; one more is rejected. 0: no limit.", at_least=0
    )
    max_waiting_per_instance: int = param(
        1000,
        "Requests that may wait at an instance; one that would wait at each is held. 0: no limit.",
        at_least=0,
    )
    fair_clients: bool = param(
        False,
        "Held requests go in turns of their clients, by tokens; else first come, first served.",
    )
    queue_timeout_s: float = param(
        60.0,
        "A request held longer than this is rejected. While no instance serves and one boots, it "
        "waits for that instead, until it is up and the time starts anew, or until a launch fails.",
        above=0,
    )
    stale_after_s: float = param(
        3.0, "An instance silent for longer is not dispatched to and takes no migration.", above=0
    )
    high_priority_target_load: float = param(
        0.12,
        "Profiled share of an instance's blocks up to which decode runs near its ideal speed; a "
        "request of high execution priority claims the rest as headroom.",
        at_least=0,
        at_most=1,
    )
    migration_interval_s: float = param(0.5, "Seconds between two migration decisions.", above=0)
    max_migrations_in: int = param(2, "Migrations an instance may receive at a time.", at_least=1)
    max_migrations_out: int = param(2, "Migrations an instance may send at a time.", at_least=1)
    max_migrations_per_decision: int = param(
        64, "Migrations started at one decision, over all instances.", at_least=1
    )
    relieve_waiting: bool = param(
        True,
        "Whether an instance that joins takes over, at once, requests that wait elsewhere: they "
        "hold no KV, and need none of the slots. For bundles that migrate.",
    )
    migration_settle_s: float = param(
        5.0,
        "A request that has just moved stays for this long, and its pair of instances is not "
        "used in the other direction.",
        at_least=0,
    )
    migration_timeout_s: float = param(
        120.0, "A migration whose end is not told frees its slots after this long.", above=0
    )
    drain_timeout_s: float = param(
        600.0, "A draining instance leaves after this long, empty or not.", above=0
    )
    min_instances: int = param(
        1,
        "Scaling never goes below this. At 0 the last instance leaves when nothing has run for "
        "scale_down_after_s, and a request that finds none has one launched at once.",
        at_least=0,
    )
    max_instances: int = param(
        0, "Scaling never goes above this; 0 leaves automatic scaling off.", at_least=0
    )
    scaling_interval_s: float = param(1.0, "Seconds between two scaling decisions.", above=0)
    scale_up_after_s: float = param(
        5.0, "The scaling policy must ask to grow for this long without a break.", at_least=0
    )
    scale_down_after_s: float = param(
        30.0, "The scaling policy must ask to shrink for this long without a break.", at_least=0
    )
    scale_up_cooldown_s: float = param(10.0, "Pause after growing.", at_least=0)
    scale_down_cooldown_s: float = param(60.0, "Pause after any scaling.", at_least=0)
    boot_timeout_s: float = param(
        900.0,
        "A launch not answered for this long is given up, and with it what was held for it.",
        above=0,
    )
    step_base_s: float = param(
        0.0432,
        "Fitted step time: seconds an engine step takes before any token. The defaults of the "
        "three are LLaMA-7B on an A10.",
        at_least=0,
    )
    step_prefill_token_s: float = param(
        0.000203, "Fitted step time: seconds each prompt token adds to a step.", at_least=0
    )
    step_running_s: float = param(
        0.00027, "Fitted step time: seconds each running request adds to a step.", at_least=0
    )
    learn_costs: bool = param(
        False,
        "Learn step times and the length of answers from the load reports, beginning with the "
        "fitted step time; off, the fitted step time stays what it is.",
    )
    follow_requests: bool = param(
        False,
        "Instances tell of the progress of each request, for a policy that looks at requests one "
        "by one, or plans a hand-over.",
    )
    prefix_index_blocks: int = param(
        0, "Bound of the index of cached prefix blocks; 0 keeps none.", at_least=0
    )
    session_ttl_s: float = param(
        600.0,
        "For this long after its last turn a session is remembered, and its next turn goes to the "
        "same instance, unless the policy knows by prefixes where its KV is. 0: not at all.",
        at_least=0,
    )
    session_imbalance: int = param(
        8,
        "A session's instance is left for the policy's choice if it has so many requests more.",
        at_least=0,
    )
    move_idle_sessions: bool = param(
        True,
        "Whether the KV of a session moves between two turns: off an instance that drains, and to "
        "another that the next turn goes to, where the copy is expected to take less time than "
        "to compute it again.",
    )
    max_session_moves: int = param(8, "Idle sessions that move at a time.", at_least=1)
    session_copy_mb_s: float = param(
        1000.0, "Megabytes a second of such a copy, until some have been timed.", above=0
    )
    session_drain_s: float = param(
        30.0,
        "A draining instance stays for up to this long after its last request, for its sessions "
        "to move.",
        at_least=0,
    )
    max_queue_attempts: int = param(
        64,
        "Held requests tried again at one event; bounds the work an event can cause.",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_params(self)
        if 0 < self.max_instances < self.min_instances:
            raise ParamError(
                "min_instances",
                f"min_instances ({self.min_instances}) must not be above max_instances "
                f"({self.max_instances})",
            )
