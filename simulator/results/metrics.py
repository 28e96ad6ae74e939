"""Metrics of a simulation: latencies, throughput, preemption, migration, cost.

Definitions are those of `vllm bench serve`, so that the numbers can be laid beside measured ones:

* TTFT: from arrival to the first token; TPOT: the rest of the answer by its other tokens, for
  answers of two tokens or more; E2E: from arrival to the last token; percentiles are interpolated
  linearly.
* Goodput: the requests a second that keep every bound of the SLO, which is the rate at which they
  arrive times the share that keeps it. vLLM's divides by the duration, and so by the drain after
  the last arrival, when nothing is offered any more.
* ITL: the gaps between two tokens of a request, all of them together, also those of requests that
  have not finished; `itl_max` is the longest gap of each request.
* Queueing: from arrival until an engine first schedules the request.

Beyond it: the prefix hit rate is the share of prompt tokens that the cache held when their request
was first scheduled (vLLM's `cached_tokens`); preemption loss is what recomputation cost a request,
over all requests; fragmentation is the share of all KV blocks that were free while some instance
had a request waiting, averaged over time (`occupancy`); instance-seconds count from launch to end,
and those of all instances are shared by the output tokens of the requests that finished.

Only finished requests enter the latencies. This module reads a result and changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from llumsched.simulator.kernel import PS_PER_S
from llumsched.simulator.results.occupancy import occupancy
from llumsched.simulator.results.records import RequestStatus
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.traces.trace import Bools, Floats, Ints

PERCENTILES = (50, 90, 95, 99)
COMMITTED = "committed"
"""The outcome of a migration that moved its request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean, percentiles and greatest of `count` values; all NaN without any."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Floats) -> Distribution:
        """The distribution of these values, NaNs left out."""
        known = values[~np.isnan(values)]
        if not len(known):
            nan = float("nan")
            return cls(count=0, mean=nan, p50=nan, p90=nan, p95=nan, p99=nan, max=nan)
        return cls._of_percentiles(
            len(known), float(known.mean()), np.percentile(known, (*PERCENTILES, 100)).tolist()
        )

    @classmethod
    def of_weighted(cls, values: Floats, counts: Ints) -> Distribution:
        """The distribution of each of these values as often as its count says."""
        order = np.argsort(values)
        values, up_to = values[order], np.cumsum(counts[order])
        num = int(up_to[-1]) if len(up_to) else 0
        if not num:
            return cls.of(np.empty(0))
        ranks = np.array((*PERCENTILES, 100)) / 100 * (num - 1)
        below = np.floor(ranks)
        low = values[np.searchsorted(up_to, below, side="right")]
        high = values[np.searchsorted(up_to, np.ceil(ranks), side="right")]
        mean = float(np.average(values, weights=counts[order]))
        return cls._of_percentiles(num, mean, (low + (high - low) * (ranks - below)).tolist())

    @classmethod
    def _of_percentiles(cls, count: int, mean: float, values: list[float]) -> Distribution:
        p50, p90, p95, p99, greatest = values
        return cls(count=count, mean=mean, p50=p50, p90=p90, p95=p95, p99=p99, max=greatest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Bounds that a request has to keep, in seconds; None is no bound."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def is_empty(self) -> bool:
        """True if it bounds nothing."""
        return self.ttft_s is None and self.tpot_s is None and self.e2e_s is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Seconds of each request, in the rows of the trace; NaN where there is none."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    queueing_s: Floats
    itl_max_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one simulation; times in seconds, `_rps` and `_tps` a second."""

    num_requests: int
    num_finished: int
    num_rejected: int
    rejections: Mapping[str, int]
    """Reason -> requests rejected for it; numbers that differ between them are `N`."""
    num_lost: int
    num_unfinished: int
    duration_s: float
    request_throughput_rps: float
    output_throughput_tps: float
    total_throughput_tps: float
    goodput_rps: float
    """Requests a second that keep the SLO, over the time in which requests arrive; NaN without one.
    """
    slo_attainment: float
    """Share of the requests that had arrived which keep the SLO; NaN without one."""
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    itl_max_s: Distribution
    """Over each request's longest gap between two tokens."""
    e2e_s: Distribution
    queueing_s: Distribution
    num_preemptions: int
    preemption_loss_s: Distribution
    prefix_hit_rate: float
    """Share of the prompt tokens of scheduled requests that the prefix cache held; NaN where the
    trace names no prefixes, or the cache is off."""
    num_migrations: int
    migration_downtime_s: Distribution
    """The pause of each move as its client sees it: from the last token at the source to the first
    at the destination."""
    kv_usage: float
    """Mean share of the KV blocks in use while requests arrive; NaN without a time line."""
    fragmentation: float
    num_policy_failures: int
    """Decisions that the scheduler made by itself, since a policy raised or answered nonsense."""
    instance_seconds: float
    mean_instances: float
    instance_hours_per_mtoken: float
    """Hours of instances for a million output tokens; NaN where nothing finished."""
    cost_per_mtoken: float
    """Cost of these hours, in the currency of the price; NaN without one."""


def latencies(result: SimulationResult) -> Latencies:
    """Per-request latencies of what has finished."""
    trace = result.trace
    is_finished = result.status == RequestStatus.FINISHED
    finished_s = np.where(is_finished, result.finished_s, np.nan)
    first_token_s = np.where(is_finished, result.first_token_s, np.nan)
    # As the simulation has them: what begins at once must not begin a picosecond early.
    arrival_s = np.rint(trace.arrival_s * PS_PER_S) / PS_PER_S
    num_gaps = result.num_output_tokens - 1
    decode_s = finished_s - first_token_s
    has_gaps = num_gaps > 0
    return Latencies(
        ttft_s=first_token_s - arrival_s,
        tpot_s=np.divide(
            decode_s, num_gaps, out=np.full(len(trace), np.nan), where=has_gaps & is_finished
        ),
        e2e_s=finished_s - arrival_s,
        queueing_s=np.where(is_finished, result.scheduled_s - arrival_s, np.nan),
        itl_max_s=np.where(is_finished & has_gaps, result.itl_max_s, np.nan),
    )


def summarise(
    result: SimulationResult, slo: Slo | None = None, *, hour_price: float | None = None
) -> Summary:
    """The summary of a result, whole or cut short; ``hour_price`` is that of an instance's hour."""
    trace, times = result.trace, latencies(result)
    is_finished = result.status == RequestStatus.FINISHED
    duration_s = result.makespan_s
    num_outputs = int(result.num_output_tokens[is_finished].sum())
    num_prompts = int(trace.num_prompt_tokens[is_finished].sum())
    has_arrived = trace.arrival_s <= result.end_s
    attainment = _ratio(_num_keeping(times, is_finished, slo), int(has_arrived.sum()))
    last_arrival_s = float(trace.arrival_s[has_arrived][-1]) if has_arrived.any() else 0.0
    filled = occupancy(result, last_arrival_s)
    seconds = instance_seconds(result)
    hours_per_mtoken = _ratio(seconds / 3600, num_outputs / 1e6)
    downtimes = [m.downtime_s for m in result.migrations if m.outcome == COMMITTED]

    def count(status: RequestStatus) -> int:
        return int((result.status == status).sum())

    return Summary(
        num_requests=len(trace),
        num_finished=count(RequestStatus.FINISHED),
        num_rejected=count(RequestStatus.REJECTED),
        rejections=reasons(result.rejections.values()),
        num_lost=count(RequestStatus.LOST),
        num_unfinished=count(RequestStatus.UNFINISHED),
        duration_s=duration_s,
        request_throughput_rps=_ratio(int(is_finished.sum()), duration_s),
        output_throughput_tps=_ratio(num_outputs, duration_s),
        total_throughput_tps=_ratio(num_outputs + num_prompts, duration_s),
        goodput_rps=attainment * _offered_rps(trace.arrival_s[has_arrived], duration_s),
        slo_attainment=attainment,
        ttft_s=Distribution.of(times.ttft_s),
        tpot_s=Distribution.of(times.tpot_s),
        itl_s=Distribution.of_weighted(*result.token_gaps.weighted()),
        itl_max_s=Distribution.of(times.itl_max_s),
        e2e_s=Distribution.of(times.e2e_s),
        queueing_s=Distribution.of(times.queueing_s),
        num_preemptions=int(result.num_preemptions.sum()),
        preemption_loss_s=Distribution.of(result.preemption_loss_s[is_finished]),
        prefix_hit_rate=_prefix_hit_rate(result),
        num_migrations=len(downtimes),
        migration_downtime_s=Distribution.of(np.array(downtimes, dtype=np.float64)),
        kv_usage=filled.kv_usage,
        fragmentation=filled.fragmentation,
        num_policy_failures=sum(failure.count for failure in result.policy_failures),
        instance_seconds=seconds,
        mean_instances=_ratio(seconds, result.end_s),
        instance_hours_per_mtoken=hours_per_mtoken,
        cost_per_mtoken=math.nan if hour_price is None else hour_price * hours_per_mtoken,
    )


def reasons(given: Iterable[str]) -> dict[str, int]:
    """How often each reason was given; those that differ in their numbers alone are one."""
    alike: dict[str, dict[str, int]] = {}
    for reason in given:
        texts = alike.setdefault(re.sub(r"\d[\d.,]*", "N", reason), {})
        texts[reason] = texts.get(reason, 0) + 1
    return {
        next(iter(texts)) if len(texts) == 1 else pattern: sum(texts.values())
        for pattern, texts in alike.items()
    }


def _offered_rps(arrival_s: Floats, duration_s: float) -> float:
    """Arrivals a second; where all come at once, what is finished a second."""
    span_s = float(arrival_s[-1] - arrival_s[0]) if len(arrival_s) else 0.0
    return (len(arrival_s) - 1) / span_s if span_s > 0 else _ratio(len(arrival_s), duration_s)


def _prefix_hit_rate(result: SimulationResult) -> float:
    if result.trace.prefix_hashes is None or not result.options.has_prefix_caches:
        return float("nan")
    is_scheduled = ~np.isnan(result.scheduled_s)
    num_prompt_tokens = int(result.trace.num_prompt_tokens[is_scheduled].sum())
    return _ratio(int(result.num_cached_tokens[is_scheduled].sum()), num_prompt_tokens)


def instance_seconds(result: SimulationResult) -> float:
    """Seconds for which instances existed, from launch to end."""
    return sum(
        (result.end_s if math.isnan(life.gone_s) else life.gone_s) - life.launched_s
        for life in result.instances
    )


def _num_keeping(times: Latencies, is_finished: Bools, slo: Slo | None) -> float:
    if slo is None or slo.is_empty:
        return float("nan")
    keeps = is_finished.copy()
    for values, bound in (
        (times.ttft_s, slo.ttft_s),
        (times.tpot_s, slo.tpot_s),
        (times.e2e_s, slo.e2e_s),
    ):
        if bound is not None:
            # An answer of one token has no TPOT, and so keeps every bound on it.
            keeps &= np.nan_to_num(values, nan=0.0) <= bound
    return float(keeps.sum())


def _ratio(amount: float, base: float) -> float:
    return amount / base if base > 0 else float("nan")
