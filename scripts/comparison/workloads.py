"""The traffic that policies are compared on: nine shapes of it, each on a cluster.

Recorded traces keep their order, lengths and gaps; a seed takes another window of them, which goes
round at the end, and time is scaled to the rate asked for. Where only lengths are published, they
are drawn with the seed, and arrivals are a Gamma process. `TUNED_ON` names the traces that the
defaults of `adaptive` were chosen on; it is judged on the others.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from llumsched.simulator.results.metrics import Slo
from llumsched.simulator.traces.arrivals import gamma_arrivals
from llumsched.simulator.traces.generators import GENERATORS, GeneratorOptions
from llumsched.simulator.traces.loaders import load_trace
from llumsched.simulator.traces.trace import Floats, Ints, Trace, make_trace

Make = Callable[[Path, float, int, int], Trace]
"""(folder of traces, requests a second, number of requests, seed) -> the trace."""

CONV = "azure/AzureLLMInferenceTrace_conv.csv"
CODE = "azure/AzureLLMInferenceTrace_code.csv"
MOONCAKE = "mooncake/conversation_trace.jsonl.gz"
MOONCAKE_SLICE = "mooncake/mooncake_trace_1000.jsonl.gz"
DEEPSEEK = "servegen/reason_deepseek-r1.tar.gz"
BWB = "lengths/etalon_bwb_stats_llama2_tokenizer_filtered_v2.csv.gz"
_MAX_REASONING_TOKENS = 12_000
_HIGH_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A kind of traffic on a cluster."""

    name: str
    source: str
    """A file below the folder of traces, or the name of a generator."""
    hardware: str
    num_requests: int
    """For 8 instances; more have as many times more."""
    slo: Slo
    make: Make

    @property
    def is_file(self) -> bool:
        """True if it needs a file."""
        return "/" in self.source


def _window(path: str, traces: Path, rate_rps: float, num_requests: int, seed: int) -> Trace:
    trace = load_trace(traces / path, seed=seed)
    first = int(np.random.default_rng([seed, 11]).integers(len(trace)))
    return rotated(trace, first, num_requests, rate_rps)


def rotated(trace: Trace, first: int, num_requests: int, rate_rps: float) -> Trace:
    """`num_requests` of a trace from one on, going round at its end, at this mean rate."""
    num_requests = min(num_requests, len(trace))
    rows = (first + np.arange(num_requests)) % len(trace)
    gaps = np.diff(trace.arrival_s, prepend=trace.arrival_s[0])
    # Between the last and the first lies an ordinary gap.
    gaps[0] = gaps[1:].mean()
    arrivals = np.cumsum(gaps[rows]) - gaps[rows[0]]
    hashes = trace.prefix_hashes
    scale = (num_requests - 1) / (rate_rps * max(arrivals[-1], 1e-9))
    return make_trace(
        trace.name,
        arrival_s=arrivals * scale,
        num_prompt_tokens=trace.num_prompt_tokens[rows],
        num_output_tokens=trace.num_output_tokens[rows],
        prefix_hashes=None if hashes is None else [hashes[row] for row in rows.tolist()],
        hash_block_size=trace.hash_block_size,
    )


def _reasoning(traces: Path, rate_rps: float, num_requests: int, seed: int) -> Trace:
    rng = np.random.default_rng([seed, 13])
    clients = _servegen_clients(str(traces / DEEPSEEK))
    rates = np.array([client.rate_rps for client in clients])
    counts = rng.multinomial(num_requests, rates / rates.sum())
    arrivals, prompts, outputs, names = [], [], [], []
    for number, (client, count) in enumerate(zip(clients, counts.tolist(), strict=True)):
        if not count:
            continue
        share = rate_rps * client.rate_rps / rates.sum()
        times = gamma_arrivals(count, rate_rps=share, cv=client.cv, rng=rng)
        arrivals.append(times % (num_requests / rate_rps))
        prompts.append(client.prompts.draw(count, rng))
        outputs.append(client.outputs.draw(count, rng))
        names += [f"client-{number}"] * count
    return make_trace(
        "deepseek-r1",
        arrival_s=np.concatenate(arrivals),
        num_prompt_tokens=np.minimum(np.concatenate(prompts), _MAX_REASONING_TOKENS),
        num_output_tokens=np.minimum(np.concatenate(outputs), _MAX_REASONING_TOKENS),
        client_ids=names,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Histogram:
    values: Ints
    shares: Floats

    @classmethod
    def of(cls, text: str) -> _Histogram:
        counts = ast.literal_eval(text)
        shares = np.array(list(counts.values()), dtype=np.float64)
        return cls(np.array(list(counts), dtype=np.int64), shares / shares.sum())

    def draw(self, num: int, rng: np.random.Generator) -> Ints:
        drawn: Ints = np.maximum(rng.choice(self.values, size=num, p=self.shares), 1)
        return drawn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Client:
    rate_rps: float
    cv: float
    prompts: _Histogram
    outputs: _Histogram


_CLIENTS: dict[str, list[_Client]] = {}
_NOON_S = 12 * 3600


def _servegen_clients(path: str) -> list[_Client]:
    """The clients of ServeGen that send something at noon, each with its lengths then."""
    if path in _CLIENTS:
        return _CLIENTS[path]
    files: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                files[Path(member.name).name] = content.read()
    clients = []
    for name in sorted(files):
        if not name.endswith("-trace.csv"):
            continue
        rows = csv.reader(files[name].decode().splitlines())
        row = next((row for row in rows if float(row[0]) == _NOON_S), None)
        lengths = json.loads(files[name.replace("trace.csv", "dataset.json")])
        if row is None or float(row[1]) <= 0 or not lengths:
            continue
        windows = {int(start): window for start, window in lengths.items()}
        window = windows.get(_NOON_S) or windows[max(w for w in windows if w <= _NOON_S)]
        clients.append(
            _Client(
                rate_rps=float(row[1]),
                cv=min(5.0, float(row[2]) or 1.0),
                prompts=_Histogram.of(window["input_tokens"]),
                outputs=_Histogram.of(window["output_tokens"]),
            )
        )
    _CLIENTS[path] = clients
    return clients


def _translation(traces: Path, rate_rps: float, num_requests: int, seed: int) -> Trace:
    rng = np.random.default_rng([seed, 17])
    with gzip.open(traces / BWB, "rt") as file:
        rows = [
            (int(row["num_prefill_tokens"]), int(row["num_decode_tokens"]))
            for row in csv.DictReader(file)
        ]
    lengths = np.array(rows)[rng.integers(len(rows), size=num_requests)]
    return make_trace(
        "bwb",
        arrival_s=gamma_arrivals(num_requests, rate_rps=rate_rps, cv=1.0, rng=rng),
        num_prompt_tokens=lengths[:, 0],
        num_output_tokens=lengths[:, 1],
    )


def _generated(
    name: str,
    cv: float,
    high_share: float,
    traces: Path,
    rate_rps: float,
    num_requests: int,
    seed: int,
) -> Trace:
    options = GeneratorOptions(rate_rps=rate_rps, num_requests=num_requests, cv=cv, seed=seed)
    trace = GENERATORS[name].make(options)
    trace = trace.scaled(rate=rate_rps / trace.rate_rps)
    return trace.with_priorities(high_share, seed=seed) if high_share else trace


_CHAT = Slo(ttft_s=2.0, tpot_s=0.1)
_LONG = Slo(ttft_s=10.0, tpot_s=0.1)
_RTX, _H100 = "rtx4090-llama-3.1-8b", "h100-llama-3.1-8b"

WORKLOADS = (
    Workload(name="chat", source=CONV, hardware=_RTX, num_requests=1500, slo=_CHAT,
             make=partial(_window, CONV)),
    Workload(name="code", source=CODE, hardware=_RTX, num_requests=1500, slo=_CHAT,
             make=partial(_window, CODE)),
    Workload(name="long context", source=MOONCAKE, hardware=_H100, num_requests=1000, slo=_LONG,
             make=partial(_window, MOONCAKE)),
    Workload(name="agents", source=MOONCAKE_SLICE, hardware=_H100, num_requests=800, slo=_LONG,
             make=partial(_window, MOONCAKE_SLICE)),
    Workload(name="reasoning", source=DEEPSEEK, hardware=_RTX, num_requests=800, slo=_CHAT,
             make=_reasoning),
    Workload(name="translation", source=BWB, hardware=_RTX, num_requests=800, slo=_CHAT,
             make=_translation),
    Workload(name="bursts", source="burstgpt", hardware=_RTX, num_requests=1500, slo=_CHAT,
             make=partial(_generated, "burstgpt", 4.0, 0.0)),
    Workload(name="priorities", source="sharegpt", hardware=_RTX, num_requests=1250, slo=_CHAT,
             make=partial(_generated, "sharegpt", 2.0, _HIGH_SHARE)),
    Workload(name="multi-turn", source="sessions", hardware=_RTX, num_requests=1500, slo=_CHAT,
             make=partial(_generated, "sessions", 1.0, 0.0)),
)  # fmt: skip

TUNED_ON = ("chat", "long context", "agents", "reasoning", "bursts")
"""`adaptive` was tuned while these were looked at."""


def shortened(workload: Workload, num_requests: int) -> Workload:
    """The same with fewer requests."""
    return replace(workload, num_requests=num_requests)
