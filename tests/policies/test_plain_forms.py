"""Decisions that are found a quick way are those of the plain reading, on clusters full of ties.

The plain forms walk the instances one by one and follow the text of the policies' docstrings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.core.events import DrainRequested, KvBlocksStored
from llumsched.core.policy import ADMIT, DispatchPolicy, Placement
from llumsched.core.snapshot import ClusterSnapshot, InstanceView
from llumsched.core.types import SchedulingRequest
from llumsched.policies._pools import split
from llumsched.policies.dynamo import KvRouter
from llumsched.policies.long_context import PromptLength
from llumsched.policies.memserve import GlobalPromptTree
from llumsched.policies.mooncake import Conductor
from llumsched.policies.prefix_aware import CachedPrefix
from llumsched.policies.slo import DeadlineSlack, predicted_ttft_s
from llumsched.policies.throughput import FillTarget, PreemptionBound
from tests.core.builders import Driver, make_request
from tests.policies.clusters import make_driver

PROMPT = tuple(range(100, 108))

loads = st.fixed_dictionaries(
    {
        "num_used_blocks": st.sampled_from((0, 0, 20, 40, 80, 86, 99)),
        "num_running": st.sampled_from((0, 1, 4, 10)),
        "num_waiting": st.sampled_from((0, 0, 2)),
        "num_waiting_blocks": st.sampled_from((0, 30)),
        "num_prefill_tokens_pending": st.sampled_from((0, 0, 500, 20_000)),
        "step_time_s": st.sampled_from((0.0, 0.05, 0.2)),
        "max_num_seqs": st.sampled_from((4, 256)),
    }
)
requests = st.builds(
    make_request,
    num_blocks=st.sampled_from((1, 8, 19, 20, 60)),
    ttft_slo_s=st.sampled_from((None, 0.3, 30.0)),
    tpot_slo_s=st.sampled_from((None, 0.01, 1.0)),
    prefix_hashes=st.sampled_from(((), PROMPT, PROMPT[:3])),
)


@st.composite
def drivers(draw: st.DrawFn) -> Driver:
    """A few instances; some share a block size, some drain, some hold a start of the prompt."""
    block_sizes = draw(st.sampled_from(((16,), (16, 32))))
    cluster = {
        name: draw(loads) | {"block_size": draw(st.sampled_from(block_sizes))}
        for name in "abcdef"[: draw(st.integers(1, 6))]
    }
    driver = make_driver("prefix_aware", cluster)
    for name in cluster:
        held = draw(st.sampled_from((0, 0, 2, 3, 8)))
        driver.handle(KvBlocksStored(instance_id=name, block_hashes=PROMPT[:held]))
        if draw(st.integers(0, 5)) == 0:
            driver.handle(DrainRequested(instance_id=name))
    return driver


def chosen(driver: Driver, policy: DispatchPolicy, request: SchedulingRequest) -> str | None:
    placement = policy.dispatch(request, driver.cluster)
    return placement.instance_id if isinstance(placement, Placement) else None


def able(request: SchedulingRequest, cluster: ClusterSnapshot) -> list[InstanceView]:
    return [i for i in cluster.accepting if i.fits(request)]


def lowest(among: Iterable[InstanceView], key: Callable[[InstanceView], float]) -> str | None:
    """Ties go to the lowest instance id."""
    return min(among, key=lambda i: (key(i), i.instance_id)).instance_id


def column(name: str) -> Callable[[InstanceView], float]:
    return lambda i: float(getattr(i.cluster.columns, name)[i.row])


room = column("num_room_blocks")
step_s = column("decode_step_s")


def num_cached(driver: Driver, i: InstanceView, request: SchedulingRequest) -> int:
    index = driver.scheduler._prefix_index
    assert index is not None
    blocks = index.blocks_of(i.instance_id)
    return len(list(itertools.takewhile(blocks.__contains__, request.prefix_hashes)))


@given(drivers(), requests)
def test_fill_target(driver: Driver, request: SchedulingRequest) -> None:
    policy = FillTarget()

    def left(i: InstanceView) -> float:
        return room(i) - request.num_prompt_blocks(i.block_size)

    among = able(request, driver.cluster)
    within = [
        i
        for i in among
        if left(i) >= (1 - policy.target_kv_usage) * i.num_total_blocks
        and i.num_requests < policy.target_batch * i.max_num_seqs
    ]
    expected = None
    if among:
        expected = lowest(within, left) if within else lowest(among, lambda i: -left(i))
    assert chosen(driver, policy, request) == expected


@given(drivers(), requests)
def test_preemption_bound(driver: Driver, request: SchedulingRequest) -> None:
    policy = PreemptionBound()

    def has_room(i: InstanceView) -> bool:
        growth = -(-policy.growth_tokens // i.block_size)
        demand = request.num_prompt_blocks(i.block_size) + growth
        return room(i) - growth * i.num_requests >= demand

    accepting = driver.cluster.accepting
    admitted = any(has_room(i) or not i.num_requests for i in accepting)
    assert (policy.admit(request, driver.cluster) == ADMIT) is admitted


@given(drivers(), requests)
def test_prompt_length(driver: Driver, request: SchedulingRequest) -> None:
    policy = PromptLength()
    cluster = driver.cluster
    among = able(request, cluster)
    unstalled = [
        i for i in among if i.num_prefill_tokens_pending <= policy.max_pending_prefill_tokens
    ]
    among = unstalled or among
    smallest_block = min((i.block_size for i in cluster), default=1)
    is_long = (
        request.num_prompt_tokens >= policy.long_share * cluster.max_total_blocks * smallest_block
    )
    packed = [i for i in among if policy.pack_freeness < i.freeness < math.inf]
    expected = None
    if is_long and among:
        expected = lowest(among, lambda i: -room(i))
    elif packed:
        expected = lowest(packed, lambda i: i.freeness)
    elif among:
        expected = lowest(among, lambda i: -i.freeness)
    assert chosen(driver, policy, request) == expected


@given(drivers(), requests)
def test_deadline_slack(driver: Driver, request: SchedulingRequest) -> None:
    policy = DeadlineSlack()
    ttft_slo_s = request.ttft_slo_s or policy.ttft_slo_s
    tpot_slo_s = request.tpot_slo_s or policy.tpot_slo_s
    cluster = driver.cluster
    ttft_s = predicted_ttft_s(request, cluster, policy.expected_output_tokens)
    among = able(request, cluster)
    expected = None
    if among:
        expected = lowest(
            among, lambda i: max(ttft_s[i.row] * (1 / ttft_slo_s), step_s(i) * (1 / tpot_slo_s))
        )
    assert chosen(driver, policy, request) == expected


@given(drivers(), requests)
def test_cached_prefix(driver: Driver, request: SchedulingRequest) -> None:
    policy = CachedPrefix(max_imbalance=3, min_match_blocks=2)
    among = able(request, driver.cluster)
    least = min((i.num_requests for i in among), default=0)
    holders = [
        i for i in among if i.num_requests <= least + 3 and num_cached(driver, i, request) >= 2
    ]
    expected = None
    if holders:
        longest = max(num_cached(driver, i, request) for i in holders)
        equal = [i for i in holders if num_cached(driver, i, request) == longest]
        expected = lowest(equal, lambda i: -i.freeness)
    elif among:
        expected = lowest(among, lambda i: -i.freeness)
    assert chosen(driver, policy, request) == expected


@pytest.mark.slow
@given(drivers(), requests)
def test_global_prompt_tree(driver: Driver, request: SchedulingRequest) -> None:
    policy = GlobalPromptTree()
    pool = split(driver.cluster, policy.prefill_share).prefill
    among = [i for i in able(request, driver.cluster) if pool[i.row]]
    longest = max((num_cached(driver, i, request) for i in among), default=0)
    equal = [i for i in among if num_cached(driver, i, request) == longest]
    expected = lowest(equal, lambda i: i.num_prefill_tokens_pending) if equal else None
    assert chosen(driver, policy, request) == expected


@given(drivers(), requests)
def test_conductor(driver: Driver, request: SchedulingRequest) -> None:
    policy = Conductor()
    pool = split(driver.cluster, policy.prefill_share).prefill
    among = [i for i in able(request, driver.cluster) if pool[i.row]]

    def ttft_s(i: InstanceView) -> float:
        cached = min(num_cached(driver, i, request) * i.block_size, request.num_prompt_tokens - 1)
        num_tokens = i.num_prefill_tokens_pending + request.num_prompt_tokens - cached
        return num_tokens * column("prefill_token_s")(i) + step_s(i)

    expected = lowest(among, ttft_s) if among else None
    assert chosen(driver, policy, request) == expected


@given(drivers(), requests)
def test_kv_router(driver: Driver, request: SchedulingRequest) -> None:
    policy = KvRouter(overlap_weight=2.0)

    def cost(i: InstanceView) -> float:
        prefill_blocks = (
            i.num_prefill_tokens_pending / i.block_size
            + request.num_prompt_blocks(i.block_size)
            - num_cached(driver, i, request)
        )
        return 2.0 * prefill_blocks + i.num_used_blocks

    among = able(request, driver.cluster)
    assert chosen(driver, policy, request) == (lowest(among, cost) if among else None)


@given(
    st.lists(st.tuples(st.sampled_from((-math.inf, 0.0, 1.0, math.inf)), st.booleans()), max_size=8)
)
def test_rows_and_a_mask_are_the_same_choice(rows: list[tuple[float, bool]]) -> None:
    cluster = make_driver("round_robin", {f"i{row}": {} for row in range(len(rows))}).cluster
    score = np.array([value for value, _ in rows])
    mask = np.array([among for _, among in rows], dtype=np.bool_)
    numbers = np.flatnonzero(mask)
    best = max(numbers.tolist(), key=score.__getitem__, default=None)
    assert cluster.argmax(score, mask) == cluster.argmax(score, numbers) == best
    best = min(numbers.tolist(), key=score.__getitem__, default=None)
    assert cluster.argmin(score, mask) == cluster.argmin(score, numbers) == best
