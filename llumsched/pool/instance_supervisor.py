"""Keeps the instances running: starts them, notices when one dies, and starts another in its place.

    launch -> booting --booted--> running --died, hung or told to end--> gone
                 \\--failed-- back-off --> booting ...

A *berth* is the place of one instance in the pool; one that dies is followed by another, with a new
id, after a pause that doubles while they die young. So a crash loop costs little, and ``describe``
shows it. An instance that hangs (``liveness``) is killed before anybody is told that it is dead:
whoever takes over its requests must be alone with them.

Invariants: what ends an instance is told to the scheduler first, so that it has placed the requests
anew when the frontend asks; nobody but the thread that calls ``tick`` changes a berth.
This module does not know Ray (``instance_actor``), and decides no sizes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llumsched.pool.backoff import BackOff, pause_s
from llumsched.pool.liveness import LivenessLimits, LivenessProbe, Watched
from llumsched.wire.names import instance_name

logger = logging.getLogger(__name__)

TICK_S = 0.05
# While every instance serves and nothing is amiss. Orders, and the ends of processes, do not wait.
QUIET_TICK_S = 0.2


class RunningInstance(Watched, Protocol):
    """A process that was started to be an instance; nothing here waits."""

    def boot_failure(self) -> str | None:
        """``None`` while it boots, empty when it has, else why it will not."""

    def serve(self) -> None:
        """Begin to serve; it has booted."""

    def end_reason(self) -> str | None:
        """``None`` while it serves, else why it ended."""

    def tell_of_end(self, ended: Callable[[], None]) -> None:
        """Have this called, on any thread, when one that serves has ended."""

    def kill(self) -> None:
        """End it at once, whatever state it is in."""

    @property
    def pid(self) -> int | None:
        """Process id of the instance, once it has booted."""

    @property
    def node(self) -> str | None:
        """The address of its machine, once it has booted."""


class InstanceHost(Protocol):
    """Host of the instances that the supervisor acts on."""

    def start(self, engine_index: int, launch_id: str | None) -> RunningInstance:
        """Begin to start an instance."""

    def heard(self) -> Mapping[int, float]:
        """By engine index, the silence of the engine's loop that the last beat since the last call
        told, in seconds."""

    def tell_scheduler(self, instance_id: str, reason: str) -> bool:
        """Say that an instance is gone; whether it was heard."""

    def gone(self, engine_index: int, *, expected: bool) -> None:
        """An instance is gone; called once for each that has served."""

    def refused(self, launch_id: str, reason: str) -> None:
        """Report that an ordered instance will not come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSlotStatus:
    """``pid`` is that of its process and ``node`` the address of its machine in the Ray cluster,
    once it has booted.

    ``state`` is ``booting``, ``running`` or ``backing off``; ``num_deaths`` counts instances
    that ended here without being told to, ``last_failure`` says how the latest did.
    """

    instance_id: str
    pid: int | None
    state: str
    num_deaths: int
    last_failure: str
    retry_in_s: float | None
    node: str | None = None


@dataclass(slots=True, kw_only=True)
class _Berth:
    engine_index: int
    launch_id: str | None
    instance: RunningInstance | None
    since_s: float
    vital_signs: LivenessProbe | None = None
    has_started: bool = False
    is_running: bool = False
    is_ending: bool = False
    is_replaced: bool = False
    is_claimed: bool = False
    """An order of the scheduler's counts on what comes here."""
    has_failed: bool = False
    """The latest boot here did."""
    retry_at_s: float = 0.0
    back_off: BackOff = field(default_factory=BackOff)

    @property
    def comes_untold(self) -> bool:
        """True if an instance is to come here that the scheduler does not know of yet."""
        return not self.is_running and not self.is_ending and self.launch_id is None

    @property
    def comes_unasked(self) -> bool:
        """True if no order counts on it either: the next one may."""
        return self.comes_untold and not self.is_claimed


class InstanceSupervisor:
    """Args:
    max_instances: no more are started than this, whoever asks.
    boot_timeout_s: how long an instance may take to load the model.
    limits: beyond them an instance that does not end by itself is dead.
    first_index: engine index of the next instance.
    """

    def __init__(
        self,
        pool: InstanceHost,
        *,
        max_instances: int,
        boot_timeout_s: float,
        limits: LivenessLimits,
        first_index: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self.max_instances = max_instances
        self._boot_timeout_s = boot_timeout_s
        self._limits = limits
        self._next_index = first_index
        self._clock = clock
        self._berths: list[_Berth] = []
        self._num_failed_boots = 0
        self._untold: dict[str, str] = {}
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._woken = threading.Event()
        self._status_changed: Callable[[], None] = lambda: None
        self._last_tick_s = clock()
        self._pause_s = TICK_S
        self._status: tuple[
            InstanceSlotStatus, ...
        ] = ()  # replaced whole, so any thread may read it
        self._num_replacing = 0

    # ---- from any thread ------------------------------------------------------------------

    def launch(self, launch_id: str | None) -> None:
        """Start one more instance."""
        self._order(lambda: self._launch(launch_id))

    def terminate(self, instance_id: str) -> None:
        """End an instance; what it still runs goes on elsewhere."""
        self._order(lambda: self._terminate(instance_id))

    def connection_broke(self, instance_id: str) -> None:
        """Take an instance for dead whose outputs may be lost."""
        self._order(lambda: self._connection_broke(instance_id))

    def replace(self, instance_id: str) -> None:
        """When this instance ends, as it is told to, start another in its place."""
        self._order(lambda: self._mark_replaced(instance_id))

    def limit(self, num_instances: int) -> None:
        """An operator wants so many: beyond that, nothing comes in the place of another."""
        self._order(lambda: self._limit(num_instances))

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.put(order)
        self._woken.set()

    def tell_of_changes(self, status_changed: Callable[[], None]) -> None:
        """Have this called, on the supervisor's thread, whenever ``describe`` says something else
        than before."""
        self._status_changed = status_changed

    @property
    def num_replacing(self) -> int:
        """Instances that come in the place of others, unasked, and have not failed to boot yet."""
        return self._num_replacing

    def describe(self) -> Sequence[InstanceSlotStatus]:
        """Every berth, as it was a moment ago."""
        return self._status

    # ---- on the supervisor's thread -------------------------------------------------------

    def adopt(self, engine_index: int, instance: RunningInstance) -> None:
        """Look after an instance that serves already."""
        berth = _Berth(
            engine_index=engine_index,
            launch_id=None,
            instance=instance,
            since_s=self._clock(),
            has_started=True,
        )
        self._berths.append(berth)
        self._next_index = max(self._next_index, engine_index + 1)
        self._has_booted(berth)
        self._status = tuple(self._describe(b, self._clock()) for b in self._berths)

    @property
    def pause_s(self) -> float:
        """Seconds until the next look is due, if nothing happens before."""
        return self._pause_s

    def rest(self) -> None:
        """Wait until there is an order, a process has ended, or the next look is due."""
        self._woken.wait(self._pause_s)
        self._woken.clear()

    def tick(self) -> None:
        """Take orders, and look at every instance once."""
        now_s = self._clock()
        # Longer than this, the watcher itself was not awake.
        awake_s = min(now_s - self._last_tick_s, 2 * self._pause_s)
        self._last_tick_s = now_s
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                break
            order()
        heard = self._pool.heard()
        for berth in list(self._berths):
            self._look_at(berth, now_s, awake_s, heard)
        for instance_id, reason in list(self._untold.items()):
            if self._pool.tell_scheduler(instance_id, reason):
                del self._untold[instance_id]
        status = tuple(self._describe(berth, now_s) for berth in self._berths)
        has_changed = status != self._status
        self._status = status
        self._num_replacing = sum(b.comes_untold and not b.has_failed for b in self._berths)
        self._pause_s = QUIET_TICK_S if self._is_quiet() else TICK_S
        if has_changed:
            self._status_changed()

    def _is_quiet(self) -> bool:
        return not self._untold and all(
            berth.is_running
            and not berth.is_ending
            and berth.vital_signs is not None
            and berth.vital_signs.is_quiet
            for berth in self._berths
        )

    def _look_at(
        self, berth: _Berth, now_s: float, awake_s: float, heard: Mapping[int, float]
    ) -> None:
        instance = berth.instance
        if instance is None:
            if now_s >= berth.retry_at_s:
                self._start(berth)
        elif berth.is_running:
            reason = instance.end_reason()
            if reason is None and berth.vital_signs is not None:
                beat = heard.get(berth.engine_index)
                reason = berth.vital_signs.tick(awake_s, beat, instance)
            if reason is not None:
                self._gone(berth, instance, reason)
            else:
                berth.back_off.lives(now_s - berth.since_s)
        else:
            failure = instance.boot_failure()
            if failure is None and now_s - berth.since_s > self._boot_timeout_s:
                failure = f"it was not ready within {self._boot_timeout_s:.0f} s"
            if failure == "":
                instance.serve()
                self._has_booted(berth)
            elif failure is not None:
                self._failed_to_boot(berth, instance, failure)

    def _has_booted(self, berth: _Berth) -> None:
        self._num_failed_boots = 0
        berth.is_running = True
        berth.has_failed = False
        berth.launch_id = None
        berth.since_s = self._clock()
        berth.vital_signs = LivenessProbe(self._limits)
        assert berth.instance is not None
        berth.instance.tell_of_end(self._woken.set)

    def _gone(self, berth: _Berth, instance: RunningInstance, reason: str) -> None:
        instance.kill()
        # Whoever holds it holds a watch on its machine as well.
        berth.vital_signs = None
        instance_id = instance_name(berth.engine_index)
        expected = berth.is_ending
        extra = {"instance_id": instance_id}
        if expected:
            logger.info("%s has left, as it was told to", instance_id, extra=extra)
        else:
            logger.error("%s ended: %s", instance_id, reason, extra=extra)
        if not self._pool.tell_scheduler(instance_id, reason):
            self._untold[instance_id] = reason
        self._pool.gone(berth.engine_index, expected=expected)
        if not expected:
            self._back_off(berth, reason)
        elif berth.is_replaced:
            self._start(berth)
        else:
            self._berths.remove(berth)

    def _failed_to_boot(self, berth: _Berth, instance: RunningInstance, failure: str) -> None:
        instance.kill()
        logger.error("%s failed to start: %s", instance_name(berth.engine_index), failure)
        if berth.is_ending:
            self._berths.remove(berth)
        elif berth.launch_id is not None:
            # Whoever ordered it decides what to do.
            self._num_failed_boots += 1
            self._pool.refused(berth.launch_id, failure)
            self._berths.remove(berth)
        else:
            berth.has_failed = True
            self._back_off(berth, failure)

    def _back_off(self, berth: _Berth, failure: str) -> None:
        now_s = self._clock()
        wait_s = berth.back_off.died(failure, now_s - berth.since_s if berth.is_running else 0.0)
        berth.instance = None
        berth.is_running = False
        berth.retry_at_s = now_s + wait_s
        logger.warning(
            "Another instance takes the place of %s in %.0f s; deaths in this place: %d",
            instance_name(berth.engine_index),
            wait_s,
            berth.back_off.num_deaths,
        )

    def _start(self, berth: _Berth) -> None:
        if berth.has_started:
            berth.engine_index = self._take_index()
        berth.has_started = True
        berth.since_s = self._clock()
        berth.is_running = berth.is_ending = berth.is_replaced = berth.is_claimed = False
        berth.instance = self._pool.start(berth.engine_index, berth.launch_id)

    def _take_index(self) -> int:
        index = self._next_index
        self._next_index += 1
        return index

    def _launch(self, launch_id: str | None) -> None:
        if self._is_served_by_one_to_come(launch_id):
            return
        if len(self._berths) >= self.max_instances:
            if launch_id is not None:
                reason = f"there are {len(self._berths)} of at most {self.max_instances} instances"
                self._pool.refused(launch_id, reason)
            return
        # What failed to boot a moment ago is not tried again at once, whoever asks.
        now_s = self._clock()
        retry_at_s = now_s + pause_s(self._num_failed_boots)
        self._berths.append(
            _Berth(
                engine_index=self._take_index(),
                launch_id=launch_id,
                instance=None,
                since_s=now_s,
                retry_at_s=retry_at_s,
            )
        )

    def _is_served_by_one_to_come(self, launch_id: str | None) -> bool:
        """True if a replacement that is coming will do, which the scheduler cannot know."""
        coming = [berth for berth in self._berths if berth.comes_unasked]
        for berth in coming:
            if berth.instance is None:
                berth.launch_id = launch_id
                berth.is_claimed = True
                return True
        if coming:
            coming[0].is_claimed = True
            if launch_id is not None:
                self._pool.refused(launch_id, "one is booting in the place of another")
            return True
        for berth in self._berths:
            if berth.is_replaced:
                berth.is_replaced = False  # by the one that is ordered now
                break
        return False

    def _limit(self, num_instances: int) -> None:
        surplus = sum(1 + b.is_replaced for b in self._berths if not b.is_ending) - num_instances
        # Those that cost nothing yet first.
        coming = sorted(
            (b for b in self._berths if b.comes_unasked), key=lambda b: b.instance is not None
        )
        for berth in coming[: max(0, surplus)]:
            if berth.instance is None:
                self._berths.remove(berth)
            else:
                self._terminate(instance_name(berth.engine_index))
        marked = [b for b in self._berths if b.is_replaced]
        for berth in marked[: max(0, surplus - len(coming))]:
            berth.is_replaced = False

    def _terminate(self, instance_id: str) -> None:
        berth = self._find(instance_id)
        if berth is None or berth.instance is None or berth.is_ending:
            return
        berth.is_ending = True
        berth.instance.kill()

    def _connection_broke(self, instance_id: str) -> None:
        berth = self._find(instance_id)
        if berth is not None and berth.vital_signs is not None:
            berth.vital_signs.connection_broke()

    def _mark_replaced(self, instance_id: str) -> None:
        berth = self._find(instance_id)
        if berth is not None:
            berth.is_replaced = True

    def _find(self, instance_id: str) -> _Berth | None:
        matches = (b for b in self._berths if instance_name(b.engine_index) == instance_id)
        return next(matches, None)

    def _describe(self, berth: _Berth, now_s: float) -> InstanceSlotStatus:
        waits = berth.instance is None
        return InstanceSlotStatus(
            instance_id=instance_name(berth.engine_index),
            pid=berth.instance.pid if berth.instance is not None else None,
            state="backing off" if waits else "running" if berth.is_running else "booting",
            num_deaths=berth.back_off.num_deaths,
            last_failure=berth.back_off.last_failure,
            retry_in_s=max(0.0, berth.retry_at_s - now_s) if waits else None,
            node=berth.instance.node if berth.instance is not None else None,
        )
