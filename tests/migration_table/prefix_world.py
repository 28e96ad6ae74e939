"""The model, in which what is cached of requests that have ended moves too, and is found again."""

from __future__ import annotations

import random

from tests.fake_engine.prefixes import PrefixEngine
from tests.fake_engine.request import expected_output
from tests.migration_table.clients import Client
from tests.migration_table.world import INSTANCE_IDS, World

MOST_TURNS = 4
NUM_TURN_TOKENS = 2
NUM_OUTPUT_TOKENS = 5


class PrefixWorld(World):
    """Half of the acts that move anything move a prefix, and a quarter sends a further turn.

    A block that came without its content, or with another's, betrays itself in the turn's tokens.
    """

    num_prefixes_moved = 0

    def __init__(self, seed: int) -> None:
        super().__init__(seed, PrefixEngine)
        # Most begin with a conversation that has ended somewhere.
        shape = random.Random(seed + 1)
        home = self.instances[shape.choice(INSTANCE_IDS)]
        self._ask(home.instance_id, [shape.randrange(100) for _ in range(6)])
        for _ in range(20):
            home.engine.schedule_step()
            self._take(home, home.engine.finish_step())

    def _ask(self, instance_id: str, prompt: list[int]) -> None:
        request_id = f"t{len(self.clients)}"
        self.instances[instance_id].engine.add_request(request_id, prompt, NUM_OUTPUT_TOKENS)
        self.clients[request_id] = Client(
            request_id=request_id,
            expected=expected_output(prompt, NUM_OUTPUT_TOKENS),
            believed_at=instance_id,
        )

    def _migrate(self, argument: int) -> None:
        instance = self._living(argument)
        engine = instance.engine
        assert isinstance(engine, PrefixEngine)
        others = [other for other in INSTANCE_IDS if other != instance.instance_id]
        if argument % 4 == 0 or not engine.ended:
            super()._migrate(argument)
            return
        ended = list(engine.ended.values())[(argument >> 2) % len(engine.ended)]
        to = others[(argument >> 4) % 2]
        if argument % 4 < 3:
            migration_id = f"p{self.num_prefixes_moved}"
            if instance.start_migration(migration_id, ended.request_id, to, has_ended=True):
                self.num_prefixes_moved += 1
        elif len(self.clients) < MOST_TURNS + 4 and self.instances[to].alive:
            tokens = ended.token_ids[: ended.num_computed_tokens]
            self._ask(to, [*tokens, *range(argument, argument + NUM_TURN_TOKENS)])
