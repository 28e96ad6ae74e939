"""The third act hangs up on all instances but the fullest, and follows only who is left."""

from __future__ import annotations

import asyncio
from collections import Counter

from scripts.demo.act_by_policy import Chats, _hang_up
from scripts.demo.client import Answer
from scripts.demo.stage import Watch


async def never() -> Answer:
    await asyncio.Event().wait()
    return Answer()


def test_the_fullest_instance_is_left_with_its_chats() -> None:
    async def run() -> None:
        chats = Chats()
        watch = Watch(num_moves=Counter({"r1": 1, "r2": 1}))
        for number, instance_id in enumerate(("a", "b", "b"), start=1):
            chats.tasks[number] = asyncio.create_task(never())
            chats.answers[number] = Answer(request_id=f"r{number}")
            watch.instance_of[f"r{number}"] = instance_id
        tasks = dict(chats.tasks)

        assert _hang_up(chats, watch) == {"a"}

        await asyncio.wait([tasks[1]])
        assert tasks[1].cancelled()
        assert set(chats.tasks) == {2, 3}
        assert (chats.number_of("r1"), chats.number_of("r3")) == (None, 3)
        assert chats.num_moves(watch) == 1, "what the gone chat did does not count"
        for number in (2, 3):
            tasks[number].cancel()

    asyncio.run(run())
