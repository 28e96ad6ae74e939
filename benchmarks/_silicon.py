"""Fixed-length points that were measured on H100s, and the same points simulated.

A point is a closed loop: so many clients, each of which sends its next request when the last has
ended, all with prompts and outputs of one length. In a trace arrivals are given, so the loop is
closed by repetition: the k-th end of a run is the arrival of request k + clients in the next run,
until no arrival changes, which is after as many runs as a client sends requests at the latest.
The clients begin evenly spread over the time of one request: without noise, those that began at
once would stay together for ever, and all prompts would come in one batch. This was chosen after a
first comparison in which they stayed together; no number of the simulation was.

This module does not know what is a good result (`fidelity`).
"""

from __future__ import annotations

import csv
import gzip
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llumsched.config import Config
from llumsched.simulator.hardware.kv_shape import attention_kv_bytes
from llumsched.simulator.hardware.spec import (
    CopyCoefficients,
    Hardware,
    KvCapacity,
    MeasuredRange,
    StepCoefficients,
)
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.metrics import latencies
from llumsched.simulator.simulation import ExtrapolationWarning, simulate
from llumsched.simulator.traces.trace import make_trace
from scripts.fit_hardware import fit
from scripts.hardware.h100 import Shape, h100

POINTS = Path("traces") / "measured" / "aiconfigurator_silicon_sample.csv.gz"
PROFILES = Path("profiles")
MODEL = "Qwen/Qwen3-32B"

QWEN3_32B = Shape(
    num_layers=64,
    hidden=5120,
    num_heads=64,
    num_kv_heads=8,
    head_size=128,
    mlp=25_600,
    vocabulary=151_936,
)
KV_BYTES = attention_kv_bytes(num_layers=64, num_kv_heads=8, head_size=128)
WEIGHT_BYTES = 2 * 32.8e9
# What vLLM may use of a card; the block count of the points is not known, so a point is left out
# where its KV comes near to what this leaves.
USABLE_BYTES = 0.85 * 80e9
BLOCK_SIZE = 16
# vLLM's defaults for a server on this card.
MAX_BATCHED_TOKENS = 8192
MAX_NUM_SEQS = 1024

REQUESTS_PER_CLIENT = 6
# The first of each client come to an instance that is not full yet.
FIRST_COUNTED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured point; times in seconds."""

    num_gpus: int
    num_prompt_tokens: int
    num_output_tokens: int
    concurrency: int
    ttft_s: float
    tpot_s: float

    @property
    def may_fill_the_cache(self) -> bool:
        """True if it holds more KV than is surely there."""
        num_tokens = self.concurrency * (self.num_prompt_tokens + self.num_output_tokens)
        return num_tokens * KV_BYTES > self.num_gpus * USABLE_BYTES - WEIGHT_BYTES


def points(path: Path) -> list[Point]:
    """The points of dense bfloat16 vLLM on H100s, one instance that does both phases."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        found = [_point(row) for row in csv.DictReader(file) if _is_wanted(row)]
    return sorted(
        found,
        key=lambda p: (p.num_gpus, p.num_prompt_tokens, p.num_output_tokens, p.concurrency),
    )


def _is_wanted(row: Mapping[str, str]) -> bool:
    return (
        (row["backend"], row["model_path"], row["system"], row["mode"], row["precision"])
        == ("vllm", MODEL, "h100_sxm", "agg", "")
    )  # fmt: skip


def _point(row: Mapping[str, str]) -> Point:
    concurrency = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
    if concurrency is None:
        raise ValueError(f"point {row['id']} does not say its concurrency")
    return Point(
        num_gpus=int(row["tp_size"]),
        num_prompt_tokens=int(row["isl"]),
        num_output_tokens=int(row["osl"]),
        concurrency=int(concurrency[1]),
        ttft_s=float(row["silicon_ttft_ms"]) / 1e3,
        tpot_s=float(row["silicon_tpot_ms"]) / 1e3,
    )


def hardware(data: Path, num_gpus: int, num_kv_tokens: int) -> Hardware:
    """The model on H100s, from operator tables alone, with a KV cache that is never full."""
    profile = h100(data / PROFILES, QWEN3_32B, num_gpus)
    fitted = fit(profile, num_kv_tokens=num_kv_tokens)
    return Hardware(
        name=f"h100-tp{num_gpus}-qwen3-32b",
        model="Qwen3-32B, bfloat16",
        accelerator=f"{num_gpus} NVIDIA H100 SXM 80 GB",
        source="operator tables of ai-dynamo/aiconfigurator and microsoft/vidur",
        fit_error=fitted.mean_error,
        kv=KvCapacity(
            num_blocks=-(-num_kv_tokens // BLOCK_SIZE) + 1,
            block_size=BLOCK_SIZE,
            bytes_per_token=KV_BYTES,
        ),
        step=StepCoefficients(
            request_s=fitted.request_s,
            kv_token_s=fitted.kv_token_s,
            skew_token_s=fitted.skew_token_s,
            prefill_pair_s=fitted.prefill_pair_s,
            table=tuple(fitted.table),
        ),
        copy=CopyCoefficients(),
        measured=MeasuredRange(
            batch_tokens=int(profile.dense[0][-1]),
            requests=int(profile.decode.num_decodes.max()),
            kv_tokens=fitted.max_kv_tokens,
        ),
    )


def simulated(point: Point, machine: Hardware) -> tuple[float, float]:
    """Mean TTFT and TPOT of the point, in seconds, once the clients have got out of step."""
    num_requests = point.concurrency * REQUESTS_PER_CLIENT
    options = SimulationOptions(
        hardware=machine,
        num_instances=1,
        config=Config.default("round_robin"),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        enable_prefix_caching=False,
    )
    start_s = np.zeros(point.concurrency)
    arrivals: np.ndarray[Any, Any] = np.zeros(num_requests)
    while True:
        trace = make_trace(
            "closed loop",
            arrival_s=arrivals,
            num_prompt_tokens=np.full(num_requests, point.num_prompt_tokens),
            num_output_tokens=np.full(num_requests, point.num_output_tokens),
        )
        with warnings.catch_warnings():
            # Chunks of 8,192 tokens are beyond the table, which the report says.
            warnings.simplefilter("ignore", ExtrapolationWarning)
            result = simulate(trace, options)
        ends = np.sort(result.finished_s)[: num_requests - point.concurrency]
        if not start_s.any():
            request_s = float(np.mean(result.finished_s[: point.concurrency]))
            start_s = np.arange(point.concurrency) / point.concurrency * request_s
        following = np.sort(np.concatenate([start_s, ends]))
        if np.array_equal(following, arrivals):
            break
        arrivals = following
    times = latencies(result)
    counted = slice(FIRST_COUNTED * point.concurrency, None)
    return float(times.ttft_s[counted].mean()), float(times.tpot_s[counted].mean())


def compared(data: Path) -> tuple[list[tuple[Point, float, float]], list[str]]:
    """Each point with the TTFT and TPOT that were simulated, and what was left out."""
    every = points(data / POINTS)
    found, notes = [], []
    left_out = [point for point in every if point.may_fill_the_cache]
    if left_out:
        notes.append(
            f"{len(left_out)} points of {len(every)} hold so much KV that the cache may have been"
            " full, and its size is not in the data: left out."
        )
    for num_gpus in sorted({point.num_gpus for point in every}):
        mine = [p for p in every if p.num_gpus == num_gpus and not p.may_fill_the_cache]
        most = max(p.concurrency * (p.num_prompt_tokens + p.num_output_tokens) for p in mine)
        try:
            machine = hardware(data, num_gpus, most)
        except ValueError as error:
            notes.append(f"{len(mine)} points on {num_gpus} GPUs are left out: {error}.")
            continue
        found += [(point, *simulated(point, machine)) for point in mine]
    return found, notes
