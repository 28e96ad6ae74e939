"""A model of a pool in which instances die: fake engines, the migration protocol, the real routes.

To the world of migrations (``tests.migration_table.world``) it adds the frontend: ordered pipes
from and to each instance, what ``Routes`` makes of them, and resumptions as ``Resumer``,
``Resumption`` and ``LostRequestDetector`` carry them out. Every byte string is a run.

Whatever happens, while one instance lives: each token comes once, in order, and is the one that the
request would have had undisturbed. In the end every request whose client has stayed is finished,
and every block is free.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llumsched.engine.base import RequestState
from llumsched.frontend.routing.routes import Arrival, Finished, Passed, Routes
from tests.fake_engine.request import FakeOutput, SentRequest, sent_request, state_of
from tests.migration_table.clients import require
from tests.migration_table.host import Instance
from tests.migration_table.world import INSTANCE_IDS, World

# How often an instance tries to end what arrives of a request before it goes on with it.
MAX_ATTEMPTS = 5


@dataclass(slots=True, kw_only=True)
class Output:
    """As the frontend sees it."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    request_id: str


class FakePool(World):
    """`seed` shapes it, the acts do the rest."""

    def __init__(self, seed: int) -> None:
        self.routes = Routes()
        self.outputs: dict[str, deque[Output | tuple[str, Arrival]]] = {
            i: deque() for i in INSTANCE_IDS
        }
        self.inputs: dict[str, deque[RequestState | Abort]] = {i: deque() for i in INSTANCE_IDS}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.resumed: list[str] = []
        self._gone: set[str] = set()
        self._placing = random.Random(f"{seed}/placing")
        super().__init__(seed)
        self._num_crashes_left = self._placing.choice((1, 2))
        # More of what the frontend adds, and of deaths.
        self._acts[:48] = (
            [self._deliver_notice] * 30 + [self._deliver_abort] * 15 + [self._crash] * 3
        )

    # ---- from the instances -----------------------------------------------------------------

    def _add_request(self, request_id: str, shape: random.Random, prefix: list[int]) -> None:
        super()._add_request(request_id, shape, prefix)
        instance_id = self.clients[request_id].believed_at
        request = self.instances[instance_id].engine.requests[request_id]
        self.prompts[request_id] = tuple(request.token_ids)
        self.routes.open(request_id).instance = INSTANCE_IDS.index(instance_id)

    def _take(self, instance: Instance, outputs: tuple[FakeOutput, ...]) -> None:
        self.outputs[instance.instance_id].extend(
            Output(
                request_id=output.request_id,
                new_token_ids=[output.token_id],
                finish_reason="length" if output.finished else None,
            )
            for output in outputs
        )

    def notice(self, request_id: str, instance_id: str, order: tuple[int, int]) -> None:
        placement_number, goes_on_at_source = order
        request = self.instances[instance_id].engine.requests[request_id]
        if goes_on_at_source:
            # Nothing announces that, and its next move has the number of the one that failed.
            request.placement_number = placement_number - 1
        else:
            self._announce(instance_id, request_id, placement_number, len(request.output_token_ids))

    def _announce(
        self, instance_id: str, request_id: str, placement_number: int, num_tokens: int
    ) -> None:
        arrival = Arrival(INSTANCE_IDS.index(instance_id), placement_number, num_tokens)
        self.outputs[instance_id].append((request_id, arrival))

    # ---- the frontend -----------------------------------------------------------------------

    def _deliver_notice(self, argument: int) -> None:
        """A message of an instance arrives, or several."""
        pipes = [i for i in INSTANCE_IDS if self.outputs[i]]
        if pipes:
            instance_id = pipes[argument % len(pipes)]
            for _ in range(1 + (argument >> 4)):
                if self.outputs[instance_id]:
                    self._arrives(instance_id, self.outputs[instance_id].popleft())

    def _arrives(self, instance_id: str, sent: Output | tuple[str, Arrival]) -> None:
        index = INSTANCE_IDS.index(instance_id)
        if isinstance(sent, Output):
            if instance_id not in self._gone:
                self._pass(*self.routes.pass_on(index, [sent]))
            return
        request_id, arrival = sent
        if instance_id in self._gone:
            if self.routes.was_to_follow(request_id, arrival):
                self._found_missing(request_id)
            return
        passed, finished, wanted = self.routes.arrive(request_id, arrival)
        self._pass(passed, finished)
        if not wanted:
            self.inputs[instance_id].append(Abort(request_id=request_id))

    def _pass(self, passed: Iterable[Passed], _: Sequence[Finished]) -> None:
        for part in passed:
            for output in part.outputs:
                client = self.clients[output.request_id]
                client.tokens += output.new_token_ids
                require(
                    client.tokens == client.expected[: len(client.tokens)],
                    f"{output.request_id}: {client.tokens}, expected {client.expected}",
                )

    def _send_abort(self, argument: int) -> None:
        """A client leaves."""
        request_id = list(self.clients)[argument % len(self.clients)]
        route = self.routes.close(request_id)
        if route is None:
            return
        self.clients[request_id].abort_sent = True
        for index in self.routes.holders(route):
            self.inputs[INSTANCE_IDS[index]].append(Abort(request_id=request_id))

    def _crash(self, argument: int) -> None:
        before = {i.instance_id for i in self._all_living()}
        super()._crash(argument)
        for instance_id in before - {i.instance_id for i in self._all_living()}:
            self.inputs[instance_id].clear()
            pipe = self.outputs[instance_id]
            for _ in range(argument % (len(pipe) + 1)):
                pipe.pop()  # it had not been sent
        for client in self.clients.values():
            client.may_be_lost = False

    def _repeat_aborts(self) -> None:
        """Each instance that may have the request is told once, and a dead one has nothing."""

    def _hear_of_death(self) -> bool:
        for instance_id, instance in self.instances.items():
            if not instance.alive and instance_id not in self._gone:
                self._gone.add(instance_id)
                for request_id in self.routes.lose(INSTANCE_IDS.index(instance_id)):
                    self._resume(request_id)
                return True
        return False

    def _found_missing(self, request_id: str) -> None:
        route = self.routes.get(request_id)
        assert route is not None
        self.routes.begin_again(route)
        self._resume(request_id)

    def _resume(self, request_id: str) -> None:
        route = self.routes.get(request_id)
        assert route is not None
        self.resumed.append(request_id)
        chosen = self._placing.choice([i for i in INSTANCE_IDS if i not in self._gone])
        stale_copies = self.routes.settle(route, INSTANCE_IDS.index(chosen), is_announced=True)
        for index in stale_copies:
            self.inputs[INSTANCE_IDS[index]].append(Abort(request_id=request_id))
        self.inputs[chosen].append(
            state_of(
                SentRequest(
                    request_id=request_id,
                    prompt_token_ids=self.prompts[request_id],
                    max_output_tokens=len(self.clients[request_id].expected),
                ),
                route.output_token_ids,
                placement_number=route.placement_number,
            )
        )

    # ---- to the instances -------------------------------------------------------------------

    def _deliver_abort(self, argument: int) -> None:
        """An abort of the frontend arrives; or the frontend hears of a death."""
        if argument % 4 == 0 and self._hear_of_death():
            return
        pipes = [i for i in INSTANCE_IDS if self.inputs[i]]
        if not pipes:
            return
        instance = self.instances[pipes[(argument >> 2) % len(pipes)]]
        sent = self.inputs[instance.instance_id].popleft()
        if not instance.alive:
            return
        if isinstance(sent, Abort):
            instance.abort(sent.request_id)
        else:
            instance.engine_work.append(lambda: self._take_over(instance, sent, MAX_ATTEMPTS))

    def _take_over(self, instance: Instance, state: RequestState, num_attempts_left: int) -> None:
        """As ``Resumption`` does it."""
        request_id = sent_request(state).request_id
        if instance.engine.is_arriving(request_id):
            # What a worker is about to write is waited for.
            require(
                num_attempts_left > 0 or bool(instance.copies), f"{request_id} arrives for ever"
            )

            def give_up() -> None:
                instance.incoming.give_up(request_id)
                instance.engine_work.append(
                    lambda: self._take_over(instance, state, num_attempts_left - 1)
                )

            instance.loop.call_soon(give_up)
            return
        if request_id in instance.engine.requests:
            instance.engine.abort(request_id)
        instance.engine.take_over(state)
        self._announce(
            instance.instance_id, request_id, state.placement_number, len(state.output_token_ids)
        )

    # ---- rest -------------------------------------------------------------------------------

    def check(self) -> None:
        """Until it was resumed, a request decodes in one place; copies of a dead one's do it no
        harm."""
        living = self._all_living()
        decoding = [
            each
            for i in living
            for each in i.engine.scheduled_request_ids
            if each not in self.resumed
        ]
        require(len(decoding) == len(set(decoding)), f"decoded twice, among {sorted(decoding)}")
        for instance in living:
            instance.engine.check()

    def _progress(self, begin_steps: bool) -> bool:
        for instance_id in INSTANCE_IDS:
            if self.outputs[instance_id]:
                self._arrives(instance_id, self.outputs[instance_id].popleft())
                return True
            if self.inputs[instance_id]:
                pipes = [i for i in INSTANCE_IDS if self.inputs[i]]
                self._deliver_abort(4 * pipes.index(instance_id) + 1)
                return True
        return self._hear_of_death() or super()._progress(begin_steps) or self._audit()

    def _audit(self) -> bool:
        """As ``LostRequestDetector`` does it, where nothing comes any more."""
        for request_id, route in self.routes:
            assert route.instance is not None
            instance = self.instances[INSTANCE_IDS[route.instance]]
            is_arriving = instance.engine.is_arriving(request_id)
            if request_id not in instance.engine.requests and not is_arriving:
                self._found_missing(request_id)
                return True
        return False
