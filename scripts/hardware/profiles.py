"""Public operator profiles, each turned into the same few columns: seconds of a whole model.

The sources differ in units, in what they measure and in how they name it; what they mean is said at
each. Everything is summed over the layers here, so that nobody behind this module knows layers.
"""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Table = Mapping[int, float]
US, MS = 1e-6, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSteps:
    """Columns: attention of all layers in a step, and what the step is made of."""

    attention_s: Floats
    num_prefill_tokens: Floats
    num_context_tokens: Floats
    """Of the prefill: tokens before the chunk."""
    num_pairs: Floats
    """Pairs of a prompt token and a token it attends to."""
    num_decodes: Floats
    num_kv_tokens: Floats
    """Context of all decodes."""

    @classmethod
    def of(cls, rows: Iterable[tuple[float, float, float, float, float, float]]) -> AttentionSteps:
        """From rows in the order of the fields."""
        columns = np.array(list(rows), dtype=np.float64).T
        names = [field.name for field in fields(cls)]
        return cls(**dict(zip(names, columns, strict=True)))

    def __len__(self) -> int:
        return len(self.attention_s)

    def __getitem__(self, chosen: NDArray[np.bool_]) -> AttentionSteps:
        return AttentionSteps(
            **{field.name: getattr(self, field.name)[chosen] for field in fields(self)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A model on an accelerator, operator by operator, in seconds."""

    dense: tuple[Floats, Floats]
    """(tokens of the step, seconds of every operator but attention and head), rising."""
    head_s: float
    """Language-model head and sampler without any sequence."""
    head_request_s: float
    """And for each sequence."""
    decode: AttentionSteps
    prefill: AttentionSteps
    skew: float = 0.0
    """Share by which attention goes from the mean context of a batch to the longest."""


def llmservingsim(folder: Path) -> Profile:
    """LLMServingSim's profile of Llama-3.1-8B: microseconds, of one layer."""
    num_layers = 32
    layers: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows(folder / "dense.csv.gz"):
        layers[row["layer"]][int(row["tokens"])] = float(row["time_us"]) * US
    once = ("embedding", "final_layernorm")
    times = dict.fromkeys(layers, num_layers) | dict.fromkeys(once, 1)
    times["layernorm"] = 2 * num_layers
    heads: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows(folder / "per_sequence.csv.gz"):
        heads[row["layer"]][int(row["sequences"])] = float(row["time_us"]) * US
    steps = []
    for row in rows(folder / "attention.csv.gz"):
        chunk, context = float(row["prefill_chunk"]), float(row["kv_prefill"])
        num_decodes = float(row["n_decode"])
        steps.append(
            (
                num_layers * float(row["time_us"]) * US,
                chunk,
                context,
                chunk * context + chunk * (chunk + 1) / 2,
                num_decodes,
                num_decodes * float(row["kv_decode"]),
            )
        )
    attention = AttentionSteps.of(steps)
    skews = [row for row in rows(folder / "skew_fit.csv.gz") if row["pc"] == "0"]
    head_s, head_request_s = line(_sum(heads, dict.fromkeys(heads, 1)))
    return Profile(
        dense=arrays(_sum(layers, times)),
        head_s=head_s,
        head_request_s=head_request_s,
        decode=attention[attention.num_prefill_tokens == 0],
        prefill=attention[attention.num_prefill_tokens > 0],
        skew=float(
            np.average(
                [float(row["alpha"]) for row in skews],
                weights=[float(row["n_samples"]) for row in skews],
            )
        ),
    )


def a800_llama_2_7b(data: Path) -> Profile:
    """Frontier's profile of Llama-2-7B on an A800: milliseconds, of one layer.

    Its attention has batches of one prompt, or of decodes with equal contexts. The head is not in
    it: it is a GEMM of aiconfigurator's A100 table.
    """
    num_layers, hidden, vocabulary = 32, 4096, 32_000
    folder = data / "frontier"
    decode, prefill = [], []
    for row in rows(folder / "a800_llama-2-7b_attention.csv.gz"):
        save = _median(row, "attn_kv_cache_save")
        chunk, context = float(row["prefill_chunk_size"]), float(row["kv_cache_size"])
        size = float(row["batch_size"])
        if row["is_prefill"] == "True":
            pairs = size * (chunk * context + chunk * (chunk + 1) / 2)
            seconds = num_layers * (_median(row, "attn_prefill") + save)
            prefill.append((seconds, size * chunk, size * context, pairs, 0.0, 0.0))
        else:
            seconds = num_layers * (_median(row, "attn_decode") + save)
            decode.append((seconds, 0.0, 0.0, 0.0, size, size * context))
    gemm = Gemm(data / "aiconfigurator" / "a100_sxm_gemm_bf16.csv.gz")
    head_s, head_request_s = line(gemm.table(vocabulary, hidden, at_most=128))
    return Profile(
        dense=arrays(_vidur_dense(folder / "a800_llama-2-7b_mlp.csv.gz", num_layers)),
        head_s=head_s,
        head_request_s=head_request_s,
        decode=AttentionSteps.of(decode),
        prefill=AttentionSteps.of(prefill),
    )


class Gemm:
    """A table of GEMM times over m (tokens), n and k; linear in n and in k in between."""

    def __init__(self, path: Path) -> None:
        self._times: dict[tuple[int, int, int], float] = {}
        for row in rows(path):
            key = (int(row["m"]), int(row["n"]), int(row["k"]))
            self._times[key] = float(row["latency"]) * MS
        self.tokens = sorted({m for m, _, _ in self._times})
        self._n = sorted({n for _, n, _ in self._times})
        self._k = sorted({k for _, _, k in self._times})

    def time_s(self, m: int, n: int, k: int) -> float:
        """Seconds of an m x k by k x n product; beyond the table in proportion to its last."""
        ends = [k] if k in self._k else [max(x for x in self._k if x < k),
                                         min(x for x in self._k if x > k)]  # fmt: skip
        return float(np.interp(k, ends, [self._by_n(m, n, end) for end in ends]))

    def table(self, n: int, k: int, *, at_most: int) -> Table:
        """m -> seconds, up to `at_most`."""
        return {m: self.time_s(m, n, k) for m in self.tokens if m <= at_most}

    def _by_n(self, m: int, n: int, k: int) -> float:
        known = [x for x in self._n if (m, x, k) in self._times]
        if n > known[-1]:
            return self._times[m, known[-1], k] * n / known[-1]
        return float(np.interp(n, known, [self._times[m, x, k] for x in known]))


def _vidur_dense(path: Path, num_layers: int) -> Table:
    """Tokens -> seconds of all layers and the embedding, from a table in Vidur's columns."""
    gemms = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    dense: dict[int, list[float]] = defaultdict(list)
    for row in rows(path):
        if row["num_tensor_parallel_workers"] == "1":
            layer = sum(_median(row, name) for name in gemms) + elementwise(row)
            dense[int(row["num_tokens"])].append(num_layers * layer + _median(row, "emb"))
    return {tokens: float(np.median(values)) for tokens, values in dense.items()}


def elementwise(
    row: Mapping[str, str], *, hidden: float = 1.0, rope: float = 1.0, activation: float = 1.0
) -> float:
    """Seconds of the element-wise operators of one layer, of a row in Vidur's columns; the factors
    are by how much the model is larger than the one that was profiled."""
    return (
        hidden * _median(row, "input_layernorm")
        + hidden * _median(row, "post_attention_layernorm")
        + rope * _median(row, "attn_rope")
        + activation * _median(row, "mlp_act")
        + hidden * 2 * _median(row, "add")
    )


def _median(row: Mapping[str, str], operator: str) -> float:
    return float(row[f"time_stats.{operator}.median"] or 0.0) * MS


def rows(path: Path) -> Iterable[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _sum(layers: Mapping[str, Table], times: Mapping[str, int]) -> Table:
    """Key -> seconds of every layer as often as it comes."""
    keys = set.intersection(*(set(table) for table in layers.values()))
    return {
        key: sum(times[name] * table[key] for name, table in layers.items()) for key in sorted(keys)
    }


def arrays(table: Table) -> tuple[Floats, Floats]:
    keys: Any = sorted(table)
    return np.array(keys, dtype=np.float64), np.array([table[key] for key in keys])


def line(table: Table) -> tuple[float, float]:
    """(constant, slope) of the least-squares line."""
    slope, constant = np.polyfit(*arrays(table), 1)
    return float(constant), max(0.0, float(slope))
