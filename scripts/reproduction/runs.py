"""Simulates points, a few at a time, and keeps what came out of each in one JSON file.

A result is known by its point and seed, so that an interrupted run goes on where it was. Latencies
are taken as the paper takes them: prefill is the time to the first token, decode the mean gap
after it, request by request; preemption loss is the mean over all requests.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from llumsched.simulator.hardware.spec import Hardware, load_hardware
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.metrics import Distribution, instance_seconds, latencies
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.generators import GeneratorOptions, generate
from llumsched.simulator.traces.lengths import PAPER_NUM_REQUESTS
from llumsched.simulator.traces.trace import Bools
from scripts.reproduction.experiments import (
    HARDWARE,
    HIGH_SHARE,
    NUM_INSTANCES,
    NUM_KV_BLOCKS,
    Point,
)

# The artifact starts scaling from here.
_START_SCALED = 8
_NICENESS = 10


def run_point(point: Point, seed: int, num_requests: int) -> dict[str, float]:
    """Simulate a point: name of a figure -> value."""
    made = GeneratorOptions(
        rate_rps=point.rate_rps, cv=point.cv, num_requests=PAPER_NUM_REQUESTS, seed=seed
    )
    trace = generate(point.mix, made).head(num_requests)
    # Drawn in any case: the base of Figure 13 is judged on the same requests.
    with_priorities = trace.with_priorities(HIGH_SHARE, seed=seed)
    options = SimulationOptions(
        hardware=_hardware(point),
        num_instances=_START_SCALED if point.is_scaled else NUM_INSTANCES,
        engine="vllm-0.1",
        config=point.policy(),
        num_kv_blocks=NUM_KV_BLOCKS,
        max_num_batched_tokens=point.max_num_batched_tokens,
        seed=seed,
    )
    result = simulate(with_priorities if point.high_share else trace, options)
    figures = _latencies(result, np.ones(len(trace), dtype=np.bool_), "")
    if point.figure == "13":
        is_high = with_priorities.execution_priority > 0
        figures |= _latencies(result, is_high, "high_") | _latencies(result, ~is_high, "normal_")
    figures["finished_percent"] = 100.0 * float(np.mean(result.status == 1))
    figures["migrations"] = float(np.count_nonzero(result.num_migrations))
    figures["mean_instances"] = instance_seconds(result) / result.end_s
    return figures


def _latencies(result: SimulationResult, among: Bools, prefix: str) -> dict[str, float]:
    times = latencies(result)
    prefill, request = Distribution.of(times.ttft_s[among]), Distribution.of(times.e2e_s[among])
    decode = Distribution.of(times.tpot_s[among] * 1e3)
    return {
        f"{prefix}prefill_mean_s": prefill.mean,
        f"{prefix}prefill_p99_s": prefill.p99,
        f"{prefix}request_mean_s": request.mean,
        f"{prefix}request_p99_s": request.p99,
        f"{prefix}decode_mean_ms": decode.mean,
        f"{prefix}decode_p99_ms": decode.p99,
        f"{prefix}preemption_loss_s": float(result.preemption_loss_s[among].mean()),
    }


def _hardware(point: Point) -> Hardware:
    hardware = _slower(load_hardware(HARDWARE), point.slowdown)
    return hardware if point.boot_s is None else dataclasses.replace(hardware, boot_s=point.boot_s)


def _slower(hardware: Hardware, factor: float) -> Hardware:
    step = hardware.step
    names = ("host_s", "floor_s", "token_s", "request_s", "kv_token_s", "prefill_pair_s")
    longer = {name: getattr(step, name) * factor for name in names}
    return dataclasses.replace(hardware, step=dataclasses.replace(step, **longer))


class Results:
    """Figures by point and seed, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for row in json.loads(path.read_text(encoding="utf-8")):
                self._rows[_key(row["point"], row["seed"])] = row

    def of(self, point: Point) -> list[Mapping[str, float]]:
        """The figures of every seed of a point."""
        plain = dataclasses.asdict(point)
        found = [row for row in self._rows.values() if row["point"] == plain]
        return [row["figures"] for row in sorted(found, key=lambda row: int(row["seed"]))]

    def has(self, point: Point, seed: int) -> bool:
        """True if a point is known for a seed."""
        return _key(dataclasses.asdict(point), seed) in self._rows

    def add_all(self, found: Iterable[tuple[Point, int, Mapping[str, float]]]) -> None:
        """Keep the figures of simulations, given with their points and seeds, at once."""
        for point, seed, figures in found:
            plain = dataclasses.asdict(point)
            short = {name: _short(value) for name, value in figures.items()}
            self._rows[_key(plain, seed)] = {"point": plain, "seed": seed, "figures": short}
        lines = [json.dumps(self._rows[key]) for key in sorted(self._rows)]
        beside = self._path.with_suffix(".new")
        beside.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        beside.replace(self._path)


def run_all(wanted: Iterable[tuple[Point, int]], results: Results, *, num_requests: int) -> None:
    """Simulate points, given with their seeds, where not known yet: on all cores, giving way to
    whatever else runs."""
    missing = [(p, seed) for p, seed in wanted if not results.has(p, seed)]
    with ProcessPoolExecutor(initializer=os.nice, initargs=(_NICENESS,)) as pool:
        futures = {pool.submit(run_point, p, seed, num_requests): (p, seed) for p, seed in missing}
        for number, future in enumerate(as_completed(futures), start=1):
            point, seed = futures[future]
            figures = future.result()
            results.add_all([(point, seed, figures)])
            print(
                f"[{number}/{len(missing)}] figure {point.figure} {point.mix} {point.setting:g}"
                f" {point.system} seed {seed}: prefill P99 {figures['prefill_p99_s']:.2f} s",
                flush=True,
            )


def _key(point: Mapping[str, Any], seed: int) -> str:
    return json.dumps([point, seed], sort_keys=True)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
