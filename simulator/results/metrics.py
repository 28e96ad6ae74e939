"""What a simulation amounts to: latencies, throughput, preemption, migration, cost.

Definitions are those of `vllm bench serve`, so that the numbers can be laid beside measured ones:

* TTFT: from arrival to the first token; TPOT: the rest of the answer by its other tokens, for
  answers of two tokens or more; E2E: from arrival to the last token; percentiles are interpolated
  linearly; goodput counts the finished requests a second that keep every bound of the SLO.
* ITL: the gaps between two tokens of a request, all of them together, also those of requests that
  have not finished; `itl_max` is the longest gap of each request.
* Queueing: from arrival until an engine first schedules the request.

Beyond it: the prefix hit rate is the share of prompt tokens that the cache held when their request
was first scheduled (vLLM's `cached_tokens`); preemption loss is what recomputation cost a request,
over all requests; fragmentation is the share of all KV blocks that were free while some instance
had a request waiting, averaged over time; instance-seconds count from launch to end.

Only finished requests enter the latencies. This module reads a result and changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

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
        """Whether it bounds nothing."""
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
    num_lost: int
    num_unfinished: int
    duration_s: float
    request_throughput_rps: float
    output_throughput_tps: float
    total_throughput_tps: float
    goodput_rps: float
    """Finished requests a second that keep the SLO; NaN without one."""
    slo_attainment: float
    """Share of all requests that keep the SLO; NaN without one."""
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
    fragmentation: float
    instance_seconds: float
    mean_instances: float


def latencies(result: SimulationResult) -> Latencies:
    """Per-request latencies of what has finished."""
    trace = result.trace
    is_finished = result.status == RequestStatus.FINISHED
    finished_s = np.where(is_finished, result.finished_s, np.nan)
    first_token_s = np.where(is_finished, result.first_token_s, np.nan)
    num_gaps = result.num_output_tokens - 1
    decode_s = finished_s - first_token_s
    has_gaps = num_gaps > 0
    return Latencies(
        ttft_s=first_token_s - trace.arrival_s,
        tpot_s=np.divide(
            decode_s, num_gaps, out=np.full(len(trace), np.nan), where=has_gaps & is_finished
        ),
        e2e_s=finished_s - trace.arrival_s,
        queueing_s=np.where(is_finished, result.scheduled_s - trace.arrival_s, np.nan),
        itl_max_s=np.where(is_finished & has_gaps, result.itl_max_s, np.nan),
    )


def summarise(result: SimulationResult, slo: Slo | None = None) -> Summary:
    """The summary of a result, whole or cut short."""
    trace, times = result.trace, latencies(result)
    is_finished = result.status == RequestStatus.FINISHED
    duration_s = result.makespan_s
    num_outputs = int(result.num_output_tokens[is_finished].sum())
    num_prompts = int(trace.num_prompt_tokens[is_finished].sum())
    num_kept = _num_keeping(times, is_finished, slo)
    seconds = instance_seconds(result)
    downtimes = [m.downtime_s for m in result.migrations if m.outcome == COMMITTED]

    def count(status: RequestStatus) -> int:
        return int((result.status == status).sum())

    return Summary(
        num_requests=len(trace),
        num_finished=count(RequestStatus.FINISHED),
        num_rejected=count(RequestStatus.REJECTED),
        num_lost=count(RequestStatus.LOST),
        num_unfinished=count(RequestStatus.UNFINISHED),
        duration_s=duration_s,
        request_throughput_rps=_ratio(int(is_finished.sum()), duration_s),
        output_throughput_tps=_ratio(num_outputs, duration_s),
        total_throughput_tps=_ratio(num_outputs + num_prompts, duration_s),
        goodput_rps=_ratio(num_kept, duration_s),
        slo_attainment=_ratio(num_kept, len(trace)),
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
        fragmentation=fragmentation(result),
        instance_seconds=seconds,
        mean_instances=_ratio(seconds, result.end_s),
    )


def fragmentation(result: SimulationResult) -> float:
    """Mean share of the KV blocks that were free while a request waited; NaN without a timeline."""
    timeline = result.timeline
    if timeline is None or not len(timeline.time_s):
        return float("nan")
    _, sample = np.unique(timeline.time_s, return_inverse=True)
    free = np.bincount(sample, weights=timeline.num_free_blocks)
    total = np.bincount(
        sample,
        weights=timeline.num_free_blocks + timeline.num_used_blocks + timeline.num_reserved_blocks,
    )
    waiting = np.bincount(sample, weights=timeline.num_waiting)
    stranded = np.where(waiting > 0, free, 0.0)
    return float(np.mean(np.divide(stranded, total, out=np.zeros_like(free), where=total > 0)))


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
