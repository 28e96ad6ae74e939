"""The frontend's link to a scheduler that answers, rejects, holds, or is silent."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import zmq
import zmq.asyncio
from vllm.v1.engine import EngineCoreRequest

from llumsched.core.types import Allowance, Budget, SchedulingRequest
from llumsched.engine.vllm.predicted_length import predicted_output_tokens
from llumsched.frontend.request.hints import hinted
from llumsched.frontend.request.rejection import Rejected
from llumsched.frontend.routing import scheduler_client
from llumsched.frontend.routing.scheduler_client import (
    Patience,
    SchedulerClient,
    SchedulerUnavailable,
    Withdrawn,
)
from llumsched.hints import SchedulingHints
from llumsched.wire.control import (
    Accepted,
    ClusterDescription,
    DescribeCluster,
    DrainInstance,
    Message,
    MigrateRequest,
    OrderLaunch,
    OrderTermination,
    Placed,
    PlaceRequest,
    RegisterFrontend,
    RequestEnded,
    ScalePool,
    SentElsewhere,
    Welcomed,
    decode_control,
    encode,
)
from llumsched.wire.keys import MAX_CONTROL_NUM_BYTES, Gate, PoolKeys
from tests.builders import engine_request

TIMEOUT_S = 20.0
Answer = Callable[[Message], Message | None]
M = TypeVar("M", bound=Message)


SHORT = Patience(placement_s=0.1, probe_s=0.2, ask_again_s=0.05, register_interval_s=0.05)


def run(
    answer: Answer,
    scenario: Callable[[SchedulerClient], Awaitable[None]],
    prefix_hashes: Callable[[EngineCoreRequest], tuple[int, ...]] | None = None,
    least_loaded: int | None = 1,
    patience: Patience = SHORT,
) -> None:
    """Play ``scenario`` against a scheduler that answers each message with ``answer``."""

    async def play() -> None:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.ROUTER)
        keys = PoolKeys.generate()
        gate = Gate(context, keys, [(socket, MAX_CONTROL_NUM_BYTES)], "the scheduler")
        socket.bind("tcp://127.0.0.1:*")

        async def serve() -> None:
            while True:
                identity, payload = await socket.recv_multipart()
                reply = answer(decode_control(payload))
                if reply is not None:
                    await socket.send_multipart([identity, encode(reply)])

        serving = asyncio.create_task(serve())
        endpoint = socket.get_string(zmq.LAST_ENDPOINT)
        link = SchedulerClient(
            endpoint, keys, lambda: least_loaded, prefix_hashes, patience=patience
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await scenario(link)
        finally:
            link.close()
            serving.cancel()
            gate.close()
            context.destroy(linger=0)

    asyncio.run(play())


async def next_of(heard: asyncio.Queue[Message], kind: type[M]) -> M:
    """The next message of a kind that the scheduler has been sent."""
    while not isinstance(message := await heard.get(), kind):
        pass
    return message


def test_a_request_goes_where_the_scheduler_says() -> None:
    def answer(message: Message) -> Message | None:
        if isinstance(message, PlaceRequest):
            assert message.request.num_prompt_tokens == 3
            assert message.request.max_output_tokens == 5
            return Placed(
                request_id=message.request.request_id,
                instance_id="instance-0",
                engine_index=0,
                reason="",
            )
        return None

    async def scenario(link: SchedulerClient) -> None:
        assert await link.place(engine_request()) == 0

    run(answer, scenario)


def test_the_scheduler_hears_what_the_client_said_of_its_request() -> None:
    heard: list[SchedulingRequest] = []

    def answer(message: Message) -> Message | None:
        if isinstance(message, PlaceRequest):
            heard.append(message.request)
            return Placed(
                request_id="r1",
                instance_id="instance-0",
                engine_index=0,
                reason="",
                predicted_output_tokens=17,
            )
        return None

    hints = SchedulingHints(ttft_slo_s=0.5, tpot_slo_s=0.05, client_id="tenant", session_id="s")
    asked = engine_request()
    own_args = {"theirs": 1}
    assert asked.sampling_params is not None
    asked.sampling_params.extra_args = own_args

    async def scenario(link: SchedulerClient) -> None:
        with hinted(hints):
            await link.place(asked)

    run(answer, scenario, prefix_hashes=lambda asked: (7, 8))
    assert heard == [
        SchedulingRequest(
            request_id="r1",
            num_prompt_tokens=3,
            max_output_tokens=5,
            client_id="tenant",
            session_id="s",
            prefix_hashes=(7, 8),
            ttft_slo_s=0.5,
            tpot_slo_s=0.05,
        )
    ]
    # The prediction goes along with the request, beside what the client put there.
    assert predicted_output_tokens(asked.sampling_params) == 17
    assert asked.sampling_params.extra_args["theirs"] == 1
    assert own_args == {"theirs": 1}


@pytest.mark.parametrize("placed_first", [True, False])
def test_a_client_that_leaves_as_its_request_is_placed_has_left(placed_first: bool) -> None:
    """A cancellation that comes as the placement does must not be lost (Python 3.11)."""

    async def scenario(link: SchedulerClient) -> None:
        placing = asyncio.create_task(link.place(engine_request()))
        for _ in range(20):
            await asyncio.sleep(0)
        if not placed_first:
            placing.cancel()
        link._placements["r1"].set_result(
            Placed(request_id="r1", instance_id="instance-0", engine_index=0, reason="")
        )
        if placed_first:
            await asyncio.sleep(0)
            placing.cancel()
        await asyncio.wait({placing})
        assert placing.cancelled()
        assert not link._placements

    run(lambda _: None, scenario)


def test_a_request_that_is_stopped_while_it_is_held_is_not_asked_for_again() -> None:
    """The scheduler has forgotten it and says nothing; asked again, it places it for nobody."""
    heard: asyncio.Queue[Message] = asyncio.Queue()

    def answer(message: Message) -> Message | None:
        heard.put_nowait(message)
        if isinstance(message, DescribeCluster):
            return ClusterDescription(
                call_id=message.call_id, policy="latency", instances=[], migrations={}
            )
        return None

    async def scenario(link: SchedulerClient) -> None:
        placing = asyncio.create_task(link.place(engine_request()))
        await next_of(heard, DescribeCluster)
        link.ended("r1", aborted=True)
        with pytest.raises(Withdrawn):
            await placing
        await next_of(heard, RequestEnded)
        await link.describe(TIMEOUT_S)
        later = [heard.get_nowait() for _ in range(heard.qsize())]
        assert not any(isinstance(message, PlaceRequest) for message in later)

    run(answer, scenario)


def test_a_rejection_says_why_and_when_to_come_again() -> None:
    def answer(message: Message) -> Message | None:
        if isinstance(message, PlaceRequest):
            return Placed(
                request_id="r1", instance_id=None, reason="the queue is full", retry_after_s=1.5
            )
        return None

    async def scenario(link: SchedulerClient) -> None:
        with pytest.raises(Rejected, match=r"the queue is full\. Try again in 2 s\.") as error:
            await link.place(engine_request())
        assert error.value.http_status == 503

    run(answer, scenario)


def test_what_is_left_of_a_quota_reaches_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    allowance = Allowance(requests=Budget(limit=60, remaining=59, reset_s=1.0))
    told: list[Allowance] = []
    monkeypatch.setattr(scheduler_client, "allowed", told.append)

    def answer(message: Message) -> Message | None:
        if isinstance(message, PlaceRequest):
            return Placed(
                request_id="r1",
                instance_id="instance-1",
                engine_index=1,
                reason="",
                allowance=allowance,
            )
        return None

    async def scenario(link: SchedulerClient) -> None:
        assert await link.place(engine_request()) == 1

    run(answer, scenario)
    assert [t.requests for t in told] == [allowance.requests]


def test_a_silent_scheduler_does_not_stop_serving() -> None:
    heard: asyncio.Queue[Message] = asyncio.Queue()

    async def scenario(link: SchedulerClient) -> None:
        assert await link.place(engine_request()) == 1  # the least loaded
        # One that is only late must not count it where it would have placed it.
        told = await next_of(heard, SentElsewhere)
        assert (told.request.request_id, told.instance_id) == ("r1", "instance-1")

    run(heard.put_nowait, scenario)


def test_without_scheduler_and_instance_a_request_does_not_wait_for_ever() -> None:
    async def scenario(link: SchedulerClient) -> None:
        with pytest.raises(Rejected, match="silent, and no instance is up") as caught:
            await link.place(engine_request())
        assert caught.value.http_status == 503

    run(lambda _: None, scenario, least_loaded=None, patience=replace(SHORT, silent_s=0.5))


def test_a_held_request_waits_as_long_as_the_scheduler_lives() -> None:
    probes = 0

    def answer(message: Message) -> Message | None:
        nonlocal probes
        if isinstance(message, DescribeCluster):
            probes += 1
            if probes == 3:
                return Placed(
                    request_id="r1", instance_id="instance-1", engine_index=1, reason="room at last"
                )
            return ClusterDescription(
                call_id=message.call_id, policy="latency", instances=[], migrations={}
            )
        return None

    async def scenario(link: SchedulerClient) -> None:
        assert await link.place(engine_request()) == 1
        assert probes >= 3

    run(answer, scenario)


@pytest.mark.parametrize("says_more", [True, False], ids=["registers frontends", "says no more"])
def test_requests_that_are_held_do_not_ask_one_by_one_whether_it_lives(says_more: bool) -> None:
    names = {f"r{number}" for number in range(40)}
    asked: Counter[str] = Counter()
    num_probes = 0

    def answer(message: Message) -> Message | None:
        nonlocal num_probes
        match message:
            case PlaceRequest(request=held):
                asked[held.request_id] += 1
                if min(asked[name] for name in names) > 3:
                    return Placed(
                        request_id=held.request_id, instance_id="a", engine_index=0, reason=""
                    )
            case DescribeCluster():
                num_probes += 1
                return ClusterDescription(
                    call_id=message.call_id, policy="latency", instances=[], migrations={}
                )
            case RegisterFrontend() if says_more:
                return Welcomed(scheduler_id="the first")
        return None

    async def scenario(link: SchedulerClient) -> None:
        await asyncio.gather(*(link.place(engine_request(name)) for name in names))

    run(answer, scenario)
    assert num_probes < len(names), "each was held three times"


def test_a_scheduler_that_restarts_is_asked_again() -> None:
    """The one that was asked first died with the request in its queue."""
    asked: list[PlaceRequest] = []

    def answer(message: Message) -> Message | None:
        match message:
            case PlaceRequest():
                asked.append(message)
                if len(asked) > 1:
                    return Placed(
                        request_id="r1", instance_id="instance-0", engine_index=0, reason=""
                    )
            case DescribeCluster():
                return ClusterDescription(
                    call_id=message.call_id, policy="latency", instances=[], migrations={}
                )
        return None

    async def scenario(link: SchedulerClient) -> None:
        assert await link.place(engine_request()) == 0

    run(answer, scenario)
    assert asked[0] == asked[1]


def test_a_request_that_lost_its_instance_says_so() -> None:
    asked: list[PlaceRequest] = []

    def answer(message: Message) -> Message | None:
        if isinstance(message, PlaceRequest):
            asked.append(message)
            return Placed(request_id="r1", instance_id="instance-0", engine_index=0, reason="")
        return None

    async def scenario(link: SchedulerClient) -> None:
        assert await link.place(engine_request(), lost=3, num_output_tokens=4) == 0

    run(answer, scenario)
    assert (asked[0].lost, asked[0].has_begun) == ("instance-3", True)
    assert asked[0].request.num_prompt_tokens == 3 + 4, "its outputs are computed again"


class ActionExecutor:
    """A supervisor that notes what it is told."""

    num_replacing = 3

    def __init__(self) -> None:
        self.told: list[object] = []
        self.heard = asyncio.Event()

    def launch(self, launch_id: str | None) -> None:
        self.told.append(("launch", launch_id))

    def replace(self, instance_id: str) -> None:
        self.told.append(("replace", instance_id))

    def terminate(self, instance_id: str) -> None:
        self.told.append(("terminate", instance_id))
        self.heard.set()


def test_orders_of_the_scheduler_are_carried_out_by_the_supervisor() -> None:
    def answer(message: Message) -> Message | None:
        match message:
            case RegisterFrontend(supervises=True, num_replacing=3):
                return OrderTermination(instance_id="instance-2", reason="drained")
            case DescribeCluster():
                return OrderLaunch(launch_id="l1", reason="load")
        return None

    async def scenario(link: SchedulerClient) -> None:
        orders = ActionExecutor()
        link.supervise_with(orders)
        with contextlib.suppress(SchedulerUnavailable):
            await link.describe(0.1)
        await orders.heard.wait()
        assert ("launch", "l1") in orders.told
        assert ("terminate", "instance-2") in orders.told

    run(answer, scenario)


def test_what_died_with_a_scheduler_is_asked_again() -> None:
    asked: list[Message] = []

    def answer(message: Message) -> Message | None:
        match message:
            case DrainInstance() | ScalePool() | DescribeCluster() | MigrateRequest():
                first = sum(type(a) is type(message) for a in asked) == 0
                asked.append(message)
                if first or isinstance(message, MigrateRequest):
                    return None
                if isinstance(message, DescribeCluster):
                    return ClusterDescription(
                        call_id=message.call_id, policy="latency", instances=[], migrations={}
                    )
                return Accepted(call_id=message.call_id)
        return None

    async def scenario(link: SchedulerClient) -> None:
        assert (await link.describe(TIMEOUT_S)).policy == "latency"
        assert (await link.drain("instance-0", None, TIMEOUT_S)).refused is None
        assert (await link.scale(3, TIMEOUT_S)).refused is None
        with pytest.raises(SchedulerUnavailable):
            await link.migrate("r1", None, 0.3)

    run(answer, scenario)
    assert [type(message) for message in asked] == [
        *(DescribeCluster, DescribeCluster),
        *(DrainInstance, DrainInstance),
        *(ScalePool, ScalePool),
        MigrateRequest,
    ], "a second order to migrate would be refused while the first is carried out"


def test_an_order_given_once_ends_with_the_scheduler_it_was_given_to() -> None:
    scheduler_ids = iter("aab")

    def answer(message: Message) -> Message | None:
        if isinstance(message, RegisterFrontend):
            return Welcomed(scheduler_id=next(scheduler_ids, "b"))
        return None

    async def scenario(link: SchedulerClient) -> None:
        with pytest.raises(SchedulerUnavailable, match="started again"):
            await link.migrate("r1", None, 2 * TIMEOUT_S)

    run(answer, scenario)
