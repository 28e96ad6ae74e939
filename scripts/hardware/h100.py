"""Any dense model on H100s, from aiconfigurator's tables: milliseconds, of one layer of one GPU.

The element-wise operators are Vidur's of Llama-2-7B on an H100, scaled to the size of the model; a
norm of queries and keys, which some models have, is not among them. With tensor parallelism two
all-reduces a layer are added, as captured in a graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.hardware.profiles import (
    MS,
    AttentionSteps,
    Gemm,
    Profile,
    arrays,
    elementwise,
    line,
    rows,
)

# The model whose element-wise operators were profiled: Llama-2-7B.
_PROFILED_HIDDEN, _PROFILED_MLP = 4096, 11_008


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A dense model with grouped heads and a gated MLP."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int


LLAMA_3_1_8B = Shape(
    num_layers=32,
    hidden=4096,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    mlp=14_336,
    vocabulary=128_256,
)


def h100_llama_3_1_8b(data: Path) -> Profile:
    """Llama-3.1-8B on one H100."""
    return h100(data, LLAMA_3_1_8B)


def h100(data: Path, shape: Shape, num_gpus: int = 1) -> Profile:
    """A model on `num_gpus` H100s with tensor parallelism."""
    folder = data / "aiconfigurator"
    gemm = Gemm(folder / "h100_sxm_gemm_bf16.csv.gz")
    queries = shape.num_heads * shape.head_size // num_gpus
    keys = shape.num_kv_heads * shape.head_size // num_gpus
    mlp = shape.mlp // num_gpus
    hidden = shape.hidden
    small: dict[int, list[float]] = defaultdict(list)
    for row in rows(data / "vidur" / "h100_llama-2-7b_mlp.csv.gz"):
        if row["num_tensor_parallel_workers"] == "1":
            seconds = elementwise(
                row,
                hidden=hidden / _PROFILED_HIDDEN,
                rope=queries / _PROFILED_HIDDEN,
                activation=mlp / _PROFILED_MLP,
            )
            small[int(row["num_tokens"])].append(seconds)
    small_s = arrays({tokens: float(np.median(values)) for tokens, values in small.items()})
    reduce_s = _all_reduce(folder, num_gpus)
    tokens = [m for m in gemm.tokens if m <= max(small)]
    dense = {
        m: shape.num_layers
        * (
            gemm.time_s(m, queries + 2 * keys, hidden)
            + gemm.time_s(m, hidden, queries)
            + gemm.time_s(m, 2 * mlp, hidden)
            + gemm.time_s(m, hidden, mlp)
            + float(np.interp(m, *small_s))
            + 2 * float(np.interp(m * hidden, *reduce_s))
        )
        for m in tokens
    }

    def is_of_model(row: Mapping[str, str]) -> bool:
        heads = (row["num_heads"], row["num_key_value_heads"], row["head_dim"])
        per_gpu = (shape.num_heads // num_gpus, shape.num_kv_heads // num_gpus, shape.head_size)
        return heads == tuple(map(str, per_gpu))

    decode = [
        (
            shape.num_layers * float(row["latency"]) * MS,
            0.0,
            0.0,
            0.0,
            float(row["batch_size"]),
            float(row["batch_size"]) * (float(row["isl"]) + float(row["step"])),
        )
        for row in rows(folder / "h100_sxm_generation_attention_bf16.csv.gz")
        if is_of_model(row) and int(row["batch_size"]) <= 256
    ]
    prefill = [
        (
            shape.num_layers * float(row["latency"]) * MS,
            float(row["batch_size"]) * float(row["isl"]),
            0.0,
            float(row["batch_size"]) * float(row["isl"]) * (float(row["isl"]) + 1) / 2,
            0.0,
            0.0,
        )
        for row in rows(folder / "h100_sxm_context_attention_bf16.csv.gz")
        if is_of_model(row) and float(row["batch_size"]) * float(row["isl"]) <= max(tokens)
    ]
    head_s, head_request_s = line(gemm.table(shape.vocabulary // num_gpus, hidden, at_most=256))
    return Profile(
        dense=arrays(dense),
        head_s=head_s,
        head_request_s=head_request_s,
        decode=AttentionSteps.of(decode),
        prefill=AttentionSteps.of(prefill),
    )


def _all_reduce(folder: Path, num_gpus: int) -> tuple[np.ndarray, np.ndarray]:
    """(elements of a message, seconds), rising; one GPU has nobody to talk to."""
    if num_gpus == 1:
        return np.zeros(1), np.zeros(1)
    return arrays(
        {
            int(row["message_size"]): float(row["latency"]) * MS
            for row in rows(folder / "h100_sxm_allreduce_bf16.csv.gz")
            if row["backend"] == "vllm_graph" and int(row["num_gpus"]) == num_gpus
        }
    )
