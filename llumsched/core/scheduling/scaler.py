"""Growing and shrinking: what a scaling policy wishes, made steady.

    LaunchInstance -> booting --InstanceJoined--> serving --drain--> draining --empty--> gone
                         \\-- LaunchFailed, or no answer within boot_timeout_s

Invariants: a wish is acted on only when it lasted and no cool-down runs; booting and serving
instances together stay within [min_instances, max_instances]; the last instance goes only when no
request has lived for `scale_down_after_s`; what is held while none serves or boots is reason enough
to launch one, at once and whatever the policy wishes; an operator's number is carried out at once
and needs no wish. This module does not know how a drain ends (`scheduler`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from llumsched.core.actions import Action, LaunchInstance
from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import ScaleDown, ScaleUp, ScalingPolicy
from llumsched.core.scheduling.answer_checks import malformed, policy_failed
from llumsched.core.scheduling.cluster_state import Cluster
from llumsched.core.types import InstanceRole, InstanceState

Drain = Callable[[str, float, list[Action]], None]


class Scaling:
    """Launches in progress, cool-downs, and since when the policy has been asking."""

    def __init__(
        self,
        *,
        policy: ScalingPolicy | None,
        options: SchedulerOptions,
        cluster: Cluster,
        drain: Drain,
        num_live: Callable[[], int],
        num_held: Callable[[], int],
    ) -> None:
        """`num_live` counts the requests that have not ended, `num_held` those held of them."""
        self._policy = policy
        self._options = options
        self._cluster = cluster
        self._drain = drain
        self._num_live = num_live
        self._num_held = num_held
        self._num_launched = 0
        self._booting: dict[str, float] = {}
        self._wish: type | None = None
        self._wish_since_s = 0.0
        self._up_rests_until_s = 0.0
        self._down_rests_until_s = 0.0
        self._retry_s = 0.0
        self._worked_s = 0.0
        self._next_s: float | None = None
        self.last_failure = ""
        """Why the latest launch that failed did; empty once an instance came."""

    # What happened.

    def joined(self, launch_id: str | None, now: float) -> None:
        """An instance came; if it answers a launch, that launch is over."""
        self._forget_launch(launch_id)
        self.last_failure = ""
        self._worked_s = now
        self._wake(now)

    def request_changed(self, now: float) -> None:
        """A request arrived or ended: the cluster is not idle."""
        self._worked_s = now
        self._wake(now)

    def _wake(self, now: float) -> None:
        """Decisions are periodic from the first instance, or the first request, on."""
        if self._options.max_instances and self._next_s is None:
            self._next_s = now + self._options.scaling_interval_s

    def launch_for_held(self, now: float, out: list[Action]) -> None:
        """With no instance that serves or boots, do not wait for a wish to last."""
        if (
            self._options.max_instances
            and self._num_held()
            and now >= self._retry_s
            and not self._num_instances()
        ):
            self._launch("no instance serves what is held", now, out)
            self._rest(now)

    def launch_failed(self, launch_id: str, reason: str, now: float) -> bool:
        """A launch will not lead to an instance; growing may be tried again at the next tick.

        Returns whether it was awaited.
        """
        if launch_id not in self._booting:
            return False
        self._forget_launch(launch_id)
        self.last_failure = reason
        self._up_rests_until_s = 0.0
        self._retry_s = now + self._options.scaling_interval_s
        return True

    def requested(self, num_instances: int, now: float, out: list[Action]) -> None:
        """Carry out an operator's number: launch what is missing, drain what is too much."""
        serving = self._serving()
        surplus = len(serving) + len(self._booting) - num_instances
        for _ in range(-surplus):
            self._launch(f"asked by an operator: {num_instances} instances", now, out)
        # Booting instances cannot be drained, so serving ones go; ties go by instance id.
        by_load = sorted(serving, key=lambda i: (self._num_requests(i), i))
        for instance_id in by_load[: max(0, surplus)]:
            self._drain(instance_id, now, out)
        self._rest(now)

    # Time.

    def next_deadline(self) -> float | None:
        """When the next decision, or the end of a boot, is due."""
        deadlines = list(self._booting.values())
        if self._next_s is not None:
            deadlines.append(self._next_s)
        return min(deadlines, default=None)

    def give_up_launches(self, now: float) -> bool:
        """Fail launches that take too long; True if there are any."""
        overdue = [launch_id for launch_id, by_s in self._booting.items() if by_s <= now]
        limit_s = self._options.boot_timeout_s
        for launch_id in overdue:
            self.launch_failed(launch_id, f"it was not up within boot_timeout_s={limit_s:g} s", now)
        return bool(overdue)

    def tick(self, now: float, out: list[Action]) -> None:
        """Decide, if it is time."""
        if self._next_s is None or now < self._next_s:
            return
        self._next_s = now + self._options.scaling_interval_s
        if self._num_live():
            self._worked_s = now
        missing = self._options.min_instances - self._num_instances()
        if missing > 0:
            for _ in range(missing):
                self._launch(f"fewer than min_instances={self._options.min_instances}", now, out)
            return
        self.launch_for_held(now, out)
        if self._policy is not None:
            self._decide(self._policy, now, out)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "num_launched": self._num_launched,
            "booting": self._booting,
            "wish": None if self._wish is None else self._wish.__name__,
            "wish_since_s": self._wish_since_s,
            "up_rests_until_s": self._up_rests_until_s,
            "down_rests_until_s": self._down_rests_until_s,
            "retry_s": self._retry_s,
            "worked_s": self._worked_s,
            "next_s": self._next_s,
            "last_failure": self.last_failure,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._num_launched = state["num_launched"]
        self._booting = dict(state["booting"])
        self._wish = {None: None, "ScaleUp": ScaleUp, "ScaleDown": ScaleDown}[state["wish"]]
        self._wish_since_s = state["wish_since_s"]
        self._up_rests_until_s = state["up_rests_until_s"]
        self._down_rests_until_s = state["down_rests_until_s"]
        self._retry_s = state["retry_s"]
        self._worked_s = state["worked_s"]
        self._next_s = state["next_s"] if self._options.max_instances else None
        self.last_failure = state["last_failure"]
        self._cluster.set_num_booting(len(self._booting))

    def _decide(self, policy: ScalingPolicy, now: float, out: list[Action]) -> None:
        cluster = self._cluster.at(now)
        try:
            wish = policy.scale(cluster)
        except Exception as error:
            out.append(policy_failed(policy, error))
            return
        problem = None if wish is None else malformed(wish, ScaleUp, ScaleDown)
        if problem is not None:
            out.append(policy_failed(policy, problem))
            return
        if type(wish) is not self._wish:
            self._wish, self._wish_since_s = (type(wish) if wish is not None else None), now
        lasted_s = now - self._wish_since_s
        if isinstance(wish, ScaleUp):
            room = self._options.max_instances - self._num_instances()
            if lasted_s >= self._options.scale_up_after_s and now >= self._up_rests_until_s:
                for _ in range(min(room, wish.num_instances)):
                    self._launch(wish.reason, now, out, wish.role)
                if min(room, wish.num_instances) > 0:
                    self._rest(now)
        elif isinstance(wish, ScaleDown):
            if wish.instance_id not in self._serving():
                out.append(
                    policy_failed(
                        policy,
                        f"wants to drain {wish.instance_id!r}, which is not a serving instance",
                    )
                )
            elif (
                lasted_s >= self._options.scale_down_after_s
                and now >= self._down_rests_until_s
                and self._num_instances() > self._options.min_instances
                # What boots was wanted a moment ago.
                and not self._booting
                and (len(self._serving()) > 1 or self._has_been_idle(now))
            ):
                self._drain(wish.instance_id, now, out)
                self._rest(now)

    def _launch(
        self,
        reason: str,
        now: float,
        out: list[Action],
        role: InstanceRole = InstanceRole.MIXED,
    ) -> None:
        self._num_launched += 1
        launch_id = f"l{self._num_launched}"
        self._booting[launch_id] = now + self._options.boot_timeout_s
        self._cluster.set_num_booting(len(self._booting))
        out.append(LaunchInstance(launch_id=launch_id, reason=reason, role=role))

    def _forget_launch(self, launch_id: str | None) -> None:
        if launch_id is not None and self._booting.pop(launch_id, None) is not None:
            self._cluster.set_num_booting(len(self._booting))

    def _rest(self, now: float) -> None:
        self._wish = None
        self._wish_since_s = now
        self._up_rests_until_s = now + self._options.scale_up_cooldown_s
        self._down_rests_until_s = now + self._options.scale_down_cooldown_s

    def _has_been_idle(self, now: float) -> bool:
        """True if no request has lived for as long as a wish to shrink must last."""
        return not self._num_live() and now - self._worked_s >= self._options.scale_down_after_s

    def _serving(self) -> list[str]:
        return [
            instance_id
            for instance_id, record in self._cluster.records.items()
            if record.state is InstanceState.SERVING
        ]

    def _num_instances(self) -> int:
        return len(self._serving()) + len(self._booting) + self._cluster.num_replacing

    def _num_requests(self, instance_id: str) -> int:
        return self._cluster.snapshot[instance_id].num_requests
