"""A model of everything that can happen to migrations: instances, a bad link, crashes, clients.

An act is two bytes and lets one thing happen: a message is delivered, lost or doubled (so
they overtake each other), a queue's next entry runs, a step begins or ends, a deadline passes
early, a client aborts, an instance dies or seems lost. Every byte string is a run. The hosts of the
protocol are those that ship (`llumsched.migration`). Invariants hold after each act:

- at most one living instance decodes a request;
- each token comes once, in order, and is the one that the request would have had undisturbed;
- every block has exactly the holders that the engine knows of;
- no event is illegal, and nothing that a host does fails.

`settle` then stops the faults and lets the world come to rest: every migration has ended, an
aborted request runs nowhere, every other has finished unless the instance that had it died, every
block is free, and no task is left.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from llumsched.core.migration.messages import AbortAtDestination
from llumsched.core.migration.source.events import MigrationState
from llumsched.core.migration.source.record import Migration, MigrationOptions
from llumsched.engine.base import StepAhead
from tests.fake_engine.engine import FakeEngine
from tests.fake_engine.request import FakeOutput, expected_output
from tests.migration_table.clients import (
    Client,
    Notice,
    Violation,
    errors_are_violations,
    require,
)
from tests.migration_table.host import Instance, Sent

T = TypeVar("T")

INSTANCE_IDS = ("a", "b", "c")
MAX_MIGRATIONS = 8


class World:
    """Three instances and a few requests; `seed` shapes them, the acts do the rest."""

    def __init__(self, seed: int, engine: type[FakeEngine] = FakeEngine, more: int = 1) -> None:
        shape = random.Random(seed)
        self.link: list[Sent] = []
        self.delayed: list[Sent] = []
        self.notices: list[Notice] = []
        self.aborts: list[str] = []
        self.clients: dict[str, Client] = {}
        self._num_migrations = 0
        self._failing_admissions = 0
        self._in_order = shape.choice((128, 192, 240))
        self._num_crashes_left = shape.choice((0, 0, 1, 2))
        self.instances = {
            instance_id: Instance(
                instance_id,
                engine(
                    num_blocks=more * shape.choice((16, 18, 32)),
                    block_size=2,
                    max_steps_in_flight=shape.choice((1, 2)),
                ),
                self,
                MigrationOptions(
                    max_stages=shape.choice((2, 4)),
                    final_stage_blocks=shape.choice((0, 1)),
                    max_final_stage_blocks=1,
                ),
                # In every other world a request waits for a step of its destination to end.
                StepAhead(ends_in_s=0.5, step_s=1.0) if seed % 2 else StepAhead(),
            )
            for instance_id in INSTANCE_IDS
        }
        shared_prefix = [shape.randrange(100) for _ in range(4)]
        for index in range(shape.choice((1, 2, 3, 4))):
            self._add_request(f"r{index}", shape, shared_prefix)
        for instance in self.instances.values():
            for _ in range(3):
                instance.engine.schedule_step()
                self._take(instance, instance.engine.finish_step())
        if shape.random() < 0.8:
            self._open_with_a_migration(shape)
        self._acts = self._weighted_acts(shape)

    def _add_request(self, request_id: str, shape: random.Random, prefix: list[int]) -> None:
        prompt = [*prefix[: shape.choice((0, 4))], *(shape.randrange(100) for _ in range(3))]
        max_output_tokens = shape.randrange(6, 24)
        instance = self.instances[shape.choice(INSTANCE_IDS)]
        instance.engine.add_request(request_id, prompt, max_output_tokens)
        self.clients[request_id] = Client(
            request_id=request_id,
            expected=expected_output(prompt, max_output_tokens),
            believed_at=instance.instance_id,
        )

    def _open_with_a_migration(self, shape: random.Random) -> None:
        """Let one migration get somewhere undisturbed, so that most runs are about its middle and
        its end and not about its beginning."""
        self._migrate(shape.randrange(256))
        target = shape.choice((MigrationState.COPYING, *[MigrationState.COMMITTING] * 4))
        for _ in range(100):
            under_way = self._under_way()
            if not under_way or under_way[0].state is target:
                break
            self._advance()
        for _ in range(shape.randrange(16)):
            self._advance()

    # ---- the network, as hosts see it -------------------------------------------------------

    def send(self, sent: Sent) -> None:
        if self.instances[sent.receiver].alive:
            self.link.append(sent)

    def notice(self, request_id: str, instance_id: str, order: tuple[int, int]) -> None:
        self.notices.append(Notice(request_id=request_id, instance_id=instance_id, order=order))

    def allow_repeats(self, request_id: str) -> None:
        self.clients[request_id].repeats_allowed = True

    def admission_fails(self) -> bool:
        if self._failing_admissions == 0:
            return False
        self._failing_admissions -= 1
        return True

    # ---- acts -------------------------------------------------------------------------------

    def run(self, acts: bytes) -> None:
        """All of `acts`, then come to rest; raises `Violation`, or what went wrong."""
        try:
            with errors_are_violations():
                for kind, argument in zip(acts[::2], acts[1::2], strict=False):
                    self._acts[kind](argument)
                    self.check()
                    if self._all_finished() and not self._under_way():
                        break
                self.settle()
        finally:
            for instance in self._all_living():
                instance.die()

    def _all_finished(self) -> bool:
        return all(client.finished for client in self.clients.values())

    def _weighted_acts(self, shape: random.Random) -> list[Callable[[int], None]]:
        """256 acts. Each world has faults of its own, some often and most never: were all of them
        equally likely, few migrations would live to see the rare ones."""
        usual = (
            (self._make_progress, 66),
            (self._begin_step, 9),
            (self._end_step, 9),
            (self._migrate, 8),
            (self._deliver_notice, 3),
            (self._deliver_abort, 3),
            (self._announce_death, 2),
            (self._drop_tombstone, 2),
            (self._end_delay, 2),
        )
        faults = (
            (self._lose_message, 5),
            (self._double_message, 5),
            (self._delay_message, 5),
            (self._pass_deadline, 4),
            (self._break_link, 3),
            (self._preempt, 3),
            (self._send_abort, 3),
            (self._fail_next_admission, 1),
            (self._crash, 2),
        )
        acts = [act for act, weight in usual for _ in range(weight)]
        for fault, weight in faults:
            acts += [fault] * (weight * shape.choice((0, 0, 1, 3)))
        return [acts[index % len(acts)] for index in range(256)]

    def _living(self, argument: int) -> Instance:
        return _pick(self._all_living(), argument)

    def _make_progress(self, argument: int) -> None:
        """Deliver a message or run an entry of a queue: a random one of those there are."""
        works: list[Callable[[], object]] = []
        for instance in self._all_living():
            works += [partial(_run_next, q) for q in (instance.engine_work, instance.copies) if q]
            if not instance.loop.is_idle:
                works.append(instance.loop.run_one)
            works += [partial(instance.loop.fire, timer) for timer in instance.sleeps()]
        choice = argument % (len(works) + min(2, len(self.link)) or 1)
        if choice < len(works):
            works[choice]()
        elif self.link:
            # Mostly in order.
            self._deliver(0 if argument < self._in_order else argument)
        if argument & 3:
            # A host mostly does what it can at once; else others go on meanwhile.
            for instance in self._all_living():
                instance.loop.run_ready()

    def _deliver(self, argument: int) -> None:
        sent = self.link.pop(argument % len(self.link))
        receiver = self.instances[sent.receiver]
        if receiver.alive:
            receiver.receive(sent)

    def _lose_message(self, argument: int) -> None:
        if self.link:
            sent = self.link[argument % len(self.link)]
            # Sent once, and never again: it is lost with its sender only.
            is_reliable = isinstance(sent.message, AbortAtDestination)
            if not is_reliable or not self.instances[sent.sender].alive:
                self.link.remove(sent)

    def _delay_message(self, argument: int) -> None:
        if self.link:
            self.delayed.append(self.link.pop(argument % len(self.link)))

    def _end_delay(self, argument: int) -> None:
        if self.delayed:
            self.link.append(self.delayed.pop(argument % len(self.delayed)))

    def _double_message(self, argument: int) -> None:
        if self.link and len(self.link) < 40:
            self.link.append(self.link[argument % len(self.link)])

    def _begin_step(self, argument: int) -> None:
        self._living(argument).engine.schedule_step()

    def _end_step(self, argument: int) -> None:
        instance = self._living(argument)
        self._take(instance, instance.engine.finish_step())

    def _migrate(self, argument: int) -> None:
        instance = self._living(argument)
        decoding = [each for each in instance.engine.running if each.output_token_ids]
        if not decoding or self._num_migrations >= MAX_MIGRATIONS:
            return
        request = _pick(decoding, argument >> 2)
        to = _pick(
            [other for other in INSTANCE_IDS if other != instance.instance_id], argument >> 4
        )
        if instance.start_migration(f"m{self._num_migrations}", request.request_id, to):
            self._num_migrations += 1

    def _pass_deadline(self, argument: int) -> None:
        waits = [
            (instance, timer) for instance in self._all_living() for timer in instance.deadlines()
        ]
        if waits:
            instance, timer = _pick(waits, argument)
            instance.loop.fire(timer)

    def _drop_tombstone(self, argument: int) -> None:
        """Tombstones outlive every message of their migration, by assumption."""
        instance = self._living(argument)
        in_flight = {sent.message.migration_id for sent in (*self.link, *self.delayed)}
        for migration_id, timer in instance.tombstones():
            if migration_id not in in_flight:
                if not self._is_on_its_way(migration_id, instance):
                    instance.loop.fire(timer)
                return

    def _is_on_its_way(self, migration_id: str, destination: Instance) -> bool:
        """True if the source may still speak of the migration, or it is about to be heard."""
        return not destination.loop.is_idle or any(
            outgoing.migration_id == migration_id
            for instance in self._all_living()
            for outgoing in instance.outgoing
        )

    def _break_link(self, argument: int) -> None:
        """One end of a migration loses sight of the other."""
        under_way = self._under_way()
        if under_way:
            migration = _pick(under_way, argument >> 1)
            ends = (migration.source, migration.destination)
            here, there = ends if argument % 2 else ends[::-1]
            if self.instances[here].alive:
                self.instances[here].peer_lost(there, is_dead=False)

    def _under_way(self) -> list[Migration]:
        return [
            migration
            for instance in self._all_living()
            for migration in instance.migrations()
            if not migration.is_terminal
        ]

    def _preempt(self, argument: int) -> None:
        engine = self._living(argument).engine
        if engine.running:
            engine.preempt(_pick(engine.running, argument >> 2).request_id)

    def _fail_next_admission(self, argument: int) -> None:
        self._failing_admissions = 1 + argument % 2

    def _send_abort(self, argument: int) -> None:
        moving = [migration.request_id for migration in self._under_way()]
        client = self.clients[_pick(moving or list(self.clients), argument)]
        if not client.abort_sent and not client.finished:
            client.abort_sent = True
            client.is_pursued = argument >= 128
            self.aborts.append(client.request_id)

    def _deliver_abort(self, argument: int) -> None:
        """An abort arrives where the frontend believes the request to be, or goes round."""
        if not self.aborts:
            return
        client = self.clients[self.aborts[argument % len(self.aborts)]]
        if client.is_pursued:
            self.aborts.remove(client.request_id)
            self._pursue(client.request_id, self._living(argument >> 4))
            return
        instance = self.instances[client.believed_at]
        if instance.alive:  # else it waits for word of where the request is now
            self.aborts.remove(client.request_id)
            instance.abort(client.request_id)

    def _pursue(self, request_id: str, instance: Instance) -> None:
        def abort_here_or_go_on() -> None:
            engines = [each.engine for each in self._all_living()]
            if request_id in instance.engine.requests:
                instance.engine.abort(request_id)
            elif any(request_id in e.requests or e.is_arriving(request_id) for e in engines):
                self.aborts.append(request_id)

        instance.engine_work.append(abort_here_or_go_on)

    def _deliver_notice(self, argument: int) -> None:
        if self.notices:
            notice = self.notices.pop(argument % len(self.notices))
            client = self.clients[notice.request_id]
            if notice.order > client.believed_order:
                client.believed_order = notice.order
                client.believed_at = notice.instance_id
                if client.abort_sent and not client.is_pursued:
                    self.aborts.append(client.request_id)
                self._repeat_aborts()

    def _crash(self, argument: int) -> None:
        if self._num_crashes_left == 0 or len(self._all_living()) == 1:
            return
        self._num_crashes_left -= 1
        ends = [end for m in self._under_way() for end in (m.source, m.destination)]
        instance = self.instances[_pick(ends, argument)] if ends else self._living(argument)
        instance.die()
        for client in self.clients.values():
            if client.request_id in instance.engine.requests:
                client.may_be_lost = True
        self._repeat_aborts()

    def _repeat_aborts(self) -> None:
        """A dead instance may have taken an abort with it, so the frontend sends all of them again
        when one dies, and again when a request turns up elsewhere after that."""
        if any(not instance.alive for instance in self.instances.values()):
            self.aborts += [each.request_id for each in self.clients.values() if each.abort_sent]

    def _announce_death(self, argument: int) -> None:
        instance = self._living(argument)
        for peer in self.instances.values():
            if not peer.alive and peer.instance_id not in instance.known_dead:
                instance.peer_lost(peer.instance_id, is_dead=True)
                return

    # ---- what the client sees ---------------------------------------------------------------

    def _take(self, instance: Instance, outputs: tuple[FakeOutput, ...]) -> None:
        for output in outputs:
            client = self.clients[output.request_id]
            if client.repeats_allowed and output.position < len(client.tokens):
                require(
                    client.tokens[output.position] == output.token_id,
                    f"{output.request_id}: a repeated token differs",
                )
                continue
            require(
                output.position == len(client.tokens),
                f"{output.request_id}: token {output.position} comes after "
                f"{len(client.tokens)} tokens",
            )
            require(
                output.token_id == client.expected[output.position],
                f"{output.request_id}: token {output.position} is wrong",
            )
            client.tokens.append(output.token_id)

    def check(self) -> None:
        living = self._all_living()
        decoding = [each for i in living for each in i.engine.scheduled_request_ids]
        require(len(decoding) == len(set(decoding)), f"decoded twice, among {sorted(decoding)}")
        for instance in living:
            instance.engine.check()

    # ---- rest -------------------------------------------------------------------------------

    def settle(self) -> None:
        """No more faults: everything sent arrives and every migration ends."""
        self._come_to_rest(begin_steps=False)
        for instance in self._all_living():
            for request_id, client in self.clients.items():
                if client.abort_sent:
                    require(
                        request_id not in instance.engine.requests,
                        f"{request_id} was aborted and still is on {instance.instance_id}",
                    )
            for outgoing in instance.outgoing:
                raise Violation(f"{outgoing.record} has not ended")
            for reservation in instance.reservations().values():
                require(reservation.may_move_on, f"{reservation} has not ended")
        self._come_to_rest(begin_steps=True)
        for client in self.clients.values():
            require(
                client.finished or client.abort_sent or client.may_be_lost,
                f"{client.request_id} stopped after {len(client.tokens)} tokens",
            )
        for instance in self._all_living():
            pool = instance.engine.pool
            require(instance.loop.num_tasks == 0, f"{instance.instance_id} has tasks left")
            require(
                pool.num_free_blocks == pool.num_blocks,
                f"{instance.instance_id} keeps {pool.num_blocks - pool.num_free_blocks} blocks",
            )

    def _all_living(self) -> list[Instance]:
        return [instance for instance in self.instances.values() if instance.alive]

    def _come_to_rest(self, *, begin_steps: bool) -> None:
        for _ in range(5_000):
            if not self._progress(begin_steps):
                return
            self.check()
        raise Violation("the world does not come to rest")

    def _advance(self) -> bool:
        """The next thing that happens by itself, in order; no new step begins."""
        if self.link:
            self._deliver(0)
            return True
        for instance in self._all_living():
            for queue in (instance.engine_work, instance.copies):
                if queue:
                    queue.popleft()()
                    return True
            if instance.loop.run_ready():
                return True
        for instance in self._all_living():
            for timer in instance.sleeps():
                instance.loop.fire(timer)
                return True
        for instance in self._all_living():
            if instance.engine.num_steps_in_flight:
                self._take(instance, instance.engine.finish_step())
                return True
        return False

    def _progress(self, begin_steps: bool) -> bool:
        """As `_advance`; if nothing happens, deaths become known and deadlines pass."""
        while self.delayed:
            self._end_delay(0)
        while self.notices:
            self._deliver_notice(0)
        for request_id in list(self.aborts):
            client = self.clients[request_id]
            if client.is_pursued:
                self.aborts.remove(request_id)
                for instance in self._all_living():
                    if request_id in instance.engine.requests:
                        self._pursue(request_id, instance)
                        return True
            elif self.instances[client.believed_at].alive:
                self.aborts.remove(request_id)
                self.instances[client.believed_at].abort(request_id)
                return True
        if self._advance():
            return True
        living = self._all_living()
        dead = {peer.instance_id for peer in self.instances.values() if not peer.alive}
        for index, instance in enumerate(living):
            if dead - instance.known_dead:
                self._announce_death(index)
                return True
        for instance in living:
            for timer in instance.deadlines():
                instance.loop.fire(timer)
                return True
        begun = [instance.engine.schedule_step() for instance in living] if begin_steps else []
        return any(begun)


def _run_next(queue: deque[Callable[[], None]]) -> None:
    queue.popleft()()


def _pick(choices: Sequence[T], argument: int) -> T:
    return choices[argument % len(choices)]
