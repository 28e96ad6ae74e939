"""Fit the step-time model to public operator profiles, and write ``configs/hardware``.

    python -m scripts.fit_hardware PROFILES [NAME ...]

PROFILES is a folder with the profiles as their authors publish them, gzipped CSV in one folder a
source: ``llmservingsim/`` (casys-kaist/LLMServingSim), ``frontier/`` (NetX-lab/Frontier),
``aiconfigurator/`` (ai-dynamo/aiconfigurator) and ``vidur/`` (microsoft/vidur).

A step is the sum of its operators. The dense ones depend on the tokens of the step alone: they
become the table, thinned to points between which a straight line is close enough. Attention is
fitted by least squares of the error relative to the whole step, first on pure decode batches
(constant, requests, context), then, with those held, on steps with a prefill chunk of 256 tokens or
more (tokens, pairs). Only operator profiles are fitted, never a measured run of an engine: those
are what the fit is tested against.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llumsched.flags import Parser
from llumsched.simulator.hardware.model_shape import ModelShape, shape_of
from llumsched.simulator.hardware.yaml_text import plain_text
from scripts.hardware.h100 import h100_llama_3_1_8b
from scripts.hardware.profiles import Profile, a800_llama_2_7b, llmservingsim

CONFIGS = Path(__file__).parents[1] / "configs" / "hardware"
# Between two points of the table a straight line is off by at most this share.
_TABLE_TOLERANCE = 0.01
# Smaller chunks are rare at an engine's token budget, and their kernels are others.
_MIN_CHUNK = 256
# Requests that share a prefix read more context in a step than the cache holds.
_SHARING = 4
_BLOCK_SIZE = 16
_LLAMA_3_1_8B = shape_of(
    {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    source="Llama-3.1-8B",
)
_LLAMA_2_7B = shape_of(
    {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32_000,
    },
    source="Llama-2-7B",
)
# Llumnix (OSDI '24) measured 1.5 to 3 %; no profile has it.
_COPY_SLOWDOWN = 0.02
_NOT_MEASURED = (
    "The copy of KV and its slow-down of steps are not in the profile: {copy} The slow-down is what"
    " Llumnix (OSDI '24) measured on an A10."
)
_NO_HOST = (
    "Kernel times alone: host_s is 0, for an engine that prepares a step while the one before runs."
    " TTFT, where nothing queues, comes out about half of a server's."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A file to write: what the profile cannot say about it, and the profile."""

    name: str
    model: str
    accelerator: str
    source: str
    num_blocks: int
    shape: ModelShape
    copy_bytes_per_s: float
    copy_base_s: float
    copy_note: str
    notes: Sequence[str]
    profile: Callable[[Path], Profile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Coefficients in seconds, and how far they are from the profile."""

    table: Sequence[tuple[int, float]]
    request_s: float
    kv_token_s: float
    skew_token_s: float
    prefill_pair_s: float
    decode_errors: np.ndarray[Any, Any]
    prefill_errors: np.ndarray[Any, Any]
    max_kv_tokens: int

    @property
    def mean_error(self) -> float:
        """Mean relative error over the fitted steps, pure decode and mixed ones counting alike."""
        return float((self.decode_errors.mean() + self.prefill_errors.mean()) / 2)


def fit(profile: Profile, *, num_kv_tokens: int) -> Fit:
    """Coefficients for a profile, on those of its points that an engine of this cache can meet."""
    decode, prefill = profile.decode, profile.prefill
    decode = decode[decode.num_kv_tokens <= _SHARING * num_kv_tokens]
    prefill = prefill[
        (prefill.num_kv_tokens + prefill.num_context_tokens <= num_kv_tokens)
        & (prefill.num_prefill_tokens >= _MIN_CHUNK)
    ]

    def dense_s(num_tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        seconds: np.ndarray[Any, Any] = np.interp(num_tokens, *profile.dense)
        return seconds

    whole = dense_s(decode.num_decodes) + profile.head_s + decode.attention_s
    terms = np.stack([np.ones(len(decode)), decode.num_decodes, decode.num_kv_tokens], axis=1)
    by_decode = _relative_least_squares(terms, decode.attention_s, whole)
    decode_errors = np.abs(terms @ by_decode - decode.attention_s) / whole

    whole = (
        dense_s(prefill.num_prefill_tokens + prefill.num_decodes)
        + profile.head_s
        + prefill.attention_s
    )
    held = (
        np.stack([np.ones(len(prefill)), prefill.num_decodes, prefill.num_kv_tokens], axis=1)
        @ by_decode
    )
    constant, request, kv_token = by_decode.tolist()
    terms = np.stack([prefill.num_prefill_tokens, prefill.num_pairs], axis=1)
    token, pair = _relative_least_squares(terms, prefill.attention_s - held, whole).tolist()
    # The table is by the tokens of a step, of which a decode has one: its share is taken off the
    # requests, so it cannot be more than theirs.
    most = request + profile.head_request_s
    if token > most:
        token = most
        rest = prefill.attention_s - held - token * prefill.num_prefill_tokens
        (pair,) = _relative_least_squares(terms[:, 1:], rest, whole).tolist()
    prefill_errors = np.abs(terms @ np.array([token, pair]) + held - prefill.attention_s) / whole
    request = most - token
    tokens, seconds = profile.dense
    table = _thinned(tokens, seconds + profile.head_s + constant + token * tokens)
    return Fit(
        table=table,
        request_s=request,
        kv_token_s=kv_token,
        skew_token_s=profile.skew * kv_token,
        prefill_pair_s=pair,
        decode_errors=decode_errors,
        prefill_errors=prefill_errors,
        max_kv_tokens=int(decode.num_kv_tokens.max()),
    )


def _relative_least_squares(
    terms: np.ndarray[Any, Any], seconds: np.ndarray[Any, Any], whole: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    solution: np.ndarray[Any, Any]
    solution, *_ = np.linalg.lstsq(terms / whole[:, None], seconds / whole, rcond=None)
    if (solution < 0).any():
        raise ValueError(f"a term came out negative: {solution}; the profile has too few points")
    return solution


def _thinned(
    tokens: np.ndarray[Any, Any], seconds: np.ndarray[Any, Any]
) -> list[tuple[int, float]]:
    """The points needed for straight lines between them to be close enough (Douglas-Peucker)."""

    def split(first: int, last: int) -> list[int]:
        inner = np.arange(first + 1, last)
        if not len(inner):
            return []
        line = np.interp(tokens[inner], tokens[[first, last]], seconds[[first, last]])
        error = np.abs(line - seconds[inner]) / seconds[inner]
        worst = int(inner[error.argmax()])
        if error.max() <= _TABLE_TOLERANCE:
            return []
        return [*split(first, worst), worst, *split(worst, last)]

    kept = [0, *split(0, len(tokens) - 1), len(tokens) - 1]
    return [(int(tokens[i]), float(f"{seconds[i]:.5g}")) for i in kept]


def as_plain(target: Target, profile: Profile, fitted: Fit) -> dict[str, Any]:
    """The content of the hardware file."""

    def percent(errors: np.ndarray[Any, Any]) -> str:
        return (
            f"{100 * errors.mean():.1f} % on average, {100 * np.percentile(errors, 95):.1f} % P95"
        )

    fit_note = (
        f"Fitted to {len(fitted.decode_errors)} decode batches, off by"
        f" {percent(fitted.decode_errors)}, and {len(fitted.prefill_errors)} steps with a prefill"
        f" chunk of {_MIN_CHUNK} tokens or more, off by {percent(fitted.prefill_errors)}, in shares"
        " of the whole step."
    )
    skew_note = (
        f"skew_token_s is {profile.skew:.3g} of kv_token_s: the mean of the profile's correction"
        " for unequal contexts in a decode batch."
        if profile.skew
        else "The profile has equal contexts in every batch: no skew term."
    )
    return {
        "name": target.name,
        "model": target.model,
        "accelerator": target.accelerator,
        "source": target.source,
        "fit_error": round(fitted.mean_error, 4),
        "kv": {
            "num_blocks": target.num_blocks,
            "block_size": _BLOCK_SIZE,
            "bytes_per_token": target.shape.kv_bytes_per_token,
        },
        "step": {
            "request_s": float(f"{fitted.request_s:.4g}"),
            "kv_token_s": float(f"{fitted.kv_token_s:.4g}"),
            "skew_token_s": float(f"{fitted.skew_token_s:.4g}"),
            "prefill_pair_s": float(f"{fitted.prefill_pair_s:.4g}"),
            "copy_slowdown": _COPY_SLOWDOWN,
            "table": [list(point) for point in fitted.table],
        },
        "copy": {
            "base_s": target.copy_base_s,
            "token_s": float(f"{target.shape.kv_bytes_per_token / target.copy_bytes_per_s:.4g}"),
        },
        "measured": {
            "batch_tokens": int(profile.dense[0][-1]),
            "requests": int(profile.decode.num_decodes.max()),
            "kv_tokens": fitted.max_kv_tokens,
        },
        "shape": dataclasses.asdict(target.shape.compute),
        "notes": [
            fit_note,
            skew_note,
            _NO_HOST,
            *target.notes,
            _NOT_MEASURED.format(copy=target.copy_note),
        ],
    }


def as_text(content: Mapping[str, Any]) -> str:
    """The hardware file as YAML."""
    header = "# Written by `python -m scripts.fit_hardware`; change the script, not this file.\n"
    return header + plain_text(content)


_PCIE_NOTE = "assumed are 12 GB/s over PCIe 4.0 by way of host memory, and 5 ms to begin."
_RDMA_NOTE = (
    "17.8 GB/s and 0.4 ms are one of the eight network cards of Mooncake's published KV transfer"
    " over RDMA (H800, 142 GB/s in all)."
)
_LLMSERVINGSIM = (
    "Operator profile of casys-kaist/LLMServingSim (commit 5daddb2, MIT), profiler/perf/{gpu}:"
    " vLLM 0.19.0 kernels, one layer."
)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="rtx4090-llama-3.1-8b",
            model="Llama-3.1-8B, bfloat16",
            accelerator="NVIDIA GeForce RTX 4090 24 GB",
            source=_LLMSERVINGSIM.format(gpu="RTX4090"),
            num_blocks=2588,
            shape=_LLAMA_3_1_8B,
            copy_bytes_per_s=12e9,
            copy_base_s=5e-3,
            copy_note=_PCIE_NOTE,
            notes=("2,588 blocks are what vLLM 0.19.0 counted on this card.",),
            profile=lambda data: llmservingsim(data / "llmservingsim/rtx4090_llama-3.1-8b_tp1"),
        ),
        Target(
            name="rtxpro6000-llama-3.1-8b",
            model="Llama-3.1-8B, bfloat16",
            accelerator="NVIDIA RTX PRO 6000 Blackwell 96 GB",
            source=_LLMSERVINGSIM.format(gpu="RTXPRO6000"),
            num_blocks=34_000,
            shape=_LLAMA_3_1_8B,
            copy_bytes_per_s=24e9,
            copy_base_s=5e-3,
            copy_note=(
                "assumed are 24 GB/s over PCIe 5.0 by way of host memory, and 5 ms to begin."
            ),
            notes=(
                (
                    "The number of blocks is not in the source: 34,000 are about what 90 % of 96 GB"
                    " leave beside the weights. Give your own where memory is short."
                ),
            ),
            profile=lambda data: llmservingsim(data / "llmservingsim/rtxpro6000_llama-3.1-8b_tp1"),
        ),
        Target(
            name="a800-llama-2-7b",
            model="Llama-2-7B, float16",
            accelerator="NVIDIA A800 80 GB (an A100 80 GB with a slower NVLink)",
            source=(
                "Operator profile of NetX-lab/Frontier (commit a4b22df, MIT),"
                " data/profiling/compute/a800, FlashInfer; the language-model head from the GEMM"
                " table of ai-dynamo/aiconfigurator (commit 095f58a, Apache-2.0) for the A100 SXM."
            ),
            num_blocks=7449,
            shape=_LLAMA_2_7B,
            copy_bytes_per_s=17.8e9,
            copy_base_s=0.4e-3,
            copy_note=_RDMA_NOTE,
            notes=(
                (
                    "7,449 blocks are what vLLM 0.2 logged for LLaMA-2-7B (a public log of"
                    " December 2023; the card is not named in it, the number is that of 80 GB)."
                ),
            ),
            profile=a800_llama_2_7b,
        ),
        Target(
            name="h100-llama-3.1-8b",
            model="Llama-3.1-8B, bfloat16",
            accelerator="NVIDIA H100 SXM 80 GB",
            source=(
                "Operator tables of ai-dynamo/aiconfigurator (commit 095f58a, Apache-2.0), vLLM"
                " 0.14.0: GEMM and attention; the element-wise operators from microsoft/vidur"
                " (commit 7d47513, MIT), H100, Llama-2-7B, the same hidden size."
            ),
            num_blocks=27_793,
            shape=_LLAMA_3_1_8B,
            copy_bytes_per_s=17.8e9,
            copy_base_s=0.4e-3,
            copy_note=_RDMA_NOTE,
            notes=(
                (
                    "27,793 blocks are what vLLM logged beside 14.96 GB of weights of this size (a"
                    " public log of July 2024; the card is not named in it, the number is that of"
                    " 80 GB)."
                ),
                (
                    "The GEMM table has no matrix of this model's MLP and head: interpolated"
                    " between those it has, linearly in each dimension."
                ),
                "No step of the table mixes prefill and decode; the two are added.",
            ),
            profile=h100_llama_3_1_8b,
        ),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files of all targets, or of those named."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("profiles", type=Path, metavar="PROFILES", help="the folder of profiles")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(TARGETS)}")
    parser.add_argument("--out", type=Path, default=CONFIGS, help="default: configs/hardware")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in TARGETS]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}; there are: {', '.join(TARGETS)}")
    for name in arguments.names or TARGETS:
        target = TARGETS[name]
        try:
            profile = target.profile(arguments.profiles)
        except FileNotFoundError as error:
            print(f"{name}: {error.filename} is missing", file=sys.stderr)
            return 1
        fitted = fit(profile, num_kv_tokens=target.num_blocks * _BLOCK_SIZE)
        content = as_plain(target, profile, fitted)
        path = arguments.out / f"{name}.yaml"
        path.write_text(as_text(content), encoding="utf-8")
        print(f"{path}: fit error {100 * fitted.mean_error:.1f} %, {len(fitted.table)} points")
    return 0


if __name__ == "__main__":
    sys.exit(main())
