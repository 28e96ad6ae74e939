"""A time line small enough to draw: KV use of each instance in some hundred points, migrations, and
what clients saw and operators paid for in fewer.

What is left out is left out evenly: a point is the mean of the samples in its slice of time, and of
too many migrations every n-th is kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llumsched.simulator.results.metrics import COMMITTED
from llumsched.simulator.results.result import SimulationResult

_MAX_SAMPLES = 400
_MAX_MIGRATIONS = 3000
_SLICES = 80


def timeline_of(result: SimulationResult) -> dict[str, Any] | None:
    """Timeline that the report draws: use of KV by instance over time, and migrations.

    At most 400 points an instance (the mean of the samples between) and 3,000 migrations.
    """
    timeline = result.timeline
    if timeline is None or not len(timeline.time_s):
        return None
    end_s = float(timeline.time_s.max()) or 1.0
    edges = np.linspace(0, end_s, _MAX_SAMPLES + 1)
    slot = np.clip(np.digitize(timeline.time_s, edges) - 1, 0, _MAX_SAMPLES - 1)
    num_instances = len(result.instances)
    cell = timeline.instance * _MAX_SAMPLES + slot
    size = num_instances * _MAX_SAMPLES
    total = np.maximum(
        timeline.num_used_blocks + timeline.num_reserved_blocks + timeline.num_free_blocks, 1
    )
    count = np.bincount(cell, minlength=size)

    def mean(values: Any) -> list[list[float | None]]:
        sums = np.bincount(cell, weights=values, minlength=size)
        means = np.divide(sums, count, out=np.full(size, np.nan), where=count > 0)
        rows = means.reshape(num_instances, _MAX_SAMPLES)
        return [[None if math.isnan(v) else round(v, 4) for v in row] for row in rows.tolist()]

    index_of = {life.instance_id: index for index, life in enumerate(result.instances)}
    moved = [m for m in result.migrations if m.outcome == COMMITTED]
    stride = -(-len(moved) // _MAX_MIGRATIONS) or 1
    return {
        "end_s": end_s,
        "instances": [life.instance_id for life in result.instances],
        "used": mean(timeline.num_used_blocks / total),
        "reserved": mean(timeline.num_reserved_blocks / total),
        "waiting": mean(timeline.num_waiting),
        "num_migrations": len(moved),
        "migrations": [
            [
                round(m.start_s, 3),
                round(m.end_s, 3),
                index_of[m.source],
                index_of[m.destination],
                m.request,
                m.num_blocks,
                m.num_stages,
                round(1e3 * m.downtime_s, 2),
            ]
            for m in moved[::stride]
        ],
        "series": _series(result, end_s),
    }


def _series(result: SimulationResult, end_s: float) -> dict[str, list[float | None]]:
    """Figures over time, each of a slice: TTFT of those that arrived in it, tokens that came in it,
    and instances that served in the middle of it."""
    edges = np.linspace(0, end_s, _SLICES + 1)
    arrival_s, first_s = result.trace.arrival_s, result.first_token_s
    slot = np.clip(np.digitize(arrival_s, edges) - 1, 0, _SLICES - 1)
    ttft_s = [(first_s - arrival_s)[(slot == i) & ~np.isnan(first_s)] for i in range(_SLICES)]
    begun = ~np.isnan(first_s)
    start_s = first_s[begun]
    # What has not finished is taken to decode to the end.
    last_s = np.where(np.isnan(result.finished_s[begun]), end_s, result.finished_s[begun])
    length_s = np.maximum(last_s - start_s, 1e-9)
    shares = np.clip((edges[:, None] - start_s) / length_s, 0.0, 1.0)
    tokens = shares @ result.num_output_tokens[begun]
    middle = (edges[1:] + edges[:-1]) / 2
    serving = sum(
        (life.serving_s <= middle) & ~(life.gone_s <= middle) for life in result.instances
    )
    return {
        "ttft_s": [round(float(np.quantile(v, 0.95)), 4) if len(v) else None for v in ttft_s],
        "tokens_per_s": [round(v, 2) for v in (np.diff(tokens) * _SLICES / end_s).tolist()],
        "instances": np.asarray(serving, dtype=float).tolist(),
    }
