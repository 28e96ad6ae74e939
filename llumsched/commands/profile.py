"""``llumsched profile MODEL``: measure an engine, and write a hardware file for the simulator."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llumsched.commands import CommandError
from llumsched.commands._vllm import ALLOW_OTHER_VLLM, refuses_vllm
from llumsched.flags import Parser
from llumsched.simulator.hardware.model_shape import ShapeError, shape_of
from llumsched.simulator.hardware.residual_plot import residual_plot
from llumsched.simulator.hardware.spec import hardware_from_plain
from llumsched.simulator.hardware.step_fit import FitError, StepFit, fit_steps
from llumsched.simulator.hardware.yaml_text import plain_text

PASSTHROUGH = True

_HOST_NOTE = (
    "Host time is in the table: the engine that was measured prepares a step after the one before"
    " has ended."
)


def main(argv: Sequence[str]) -> int:
    """Our own options are parsed here, and the others by vLLM's parser."""
    parser = Parser(
        prog="llumsched profile",
        description=(
            "Boot one vLLM engine, measure steps of many shapes, and write what the simulator needs"
            " to know of it, with a plot of the residuals beside it. Every flag of vLLM's engine is"
            " accepted: give those that you serve with."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the model hub")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="NAME.yaml")
    parser.add_argument("--accelerator", required=True, metavar="TEXT", help="what it runs on")
    parser.add_argument(
        "--seconds", type=float, default=300.0, metavar="S", help="measure for (default: 300)"
    )
    parser.add_argument(
        "--copy-gb-per-s",
        type=float,
        default=10.0,
        metavar="GB",
        help="KV copied between two instances a second, which one engine cannot tell (default: 10)",
    )
    parser.add_argument(
        ALLOW_OTHER_VLLM,
        action="store_true",
        help="measure a vLLM that this release was not written for",
    )
    arguments, engine_flags = parser.parse_known_args(list(argv))
    if arguments.out.suffix != ".yaml":
        raise CommandError(f"--out {arguments.out}: it must end in .yaml")
    for name in ("seconds", "copy_gb_per_s"):
        if not getattr(arguments, name) > 0:
            raise CommandError(f"--{name.replace('_', '-')} must be above 0")

    if refuses_vllm("profile", argv):
        return 2
    from llumsched.engine.vllm.profiling.arguments import engine_arguments
    from llumsched.engine.vllm.profiling.profile import profile_engine

    with tqdm(unit=" workloads", disable=None) as bar:

        def progress(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        profile = profile_engine(
            engine_arguments(arguments.model, engine_flags),
            budget_s=arguments.seconds,
            progress=progress,
        )
    try:
        fitted = fit_steps(profile.steps)
    except FitError as error:
        raise CommandError(str(error)) from error
    content = _content(arguments, profile, fitted)
    hardware_from_plain(content, str(arguments.out))
    arguments.out.write_text(plain_text(content), encoding="utf-8")
    plot = arguments.out.with_suffix(".residuals.svg")
    plot.write_text(
        residual_plot(
            fitted.measured_s,
            fitted.predicted_s,
            title=f"{arguments.out.stem}: predicted / measured - 1, {len(profile.steps)} steps",
        ),
        encoding="utf-8",
    )
    print(
        f"{len(profile.steps)} steps; those with no part in the fit are off by"
        f" {100 * fitted.held_out_error:.1f} % on average\nwritten: {arguments.out}, {plot}"
    )
    sys.stdout.flush()
    return 0


def _content(arguments: argparse.Namespace, profile: Any, fitted: StepFit) -> dict[str, Any]:
    """The hardware file; ``profile`` is an ``EngineProfile``, which needs vLLM to be imported."""
    step = fitted.coefficients
    tokens = [s.num_prefill_tokens + s.num_decodes for s in profile.steps]
    bytes_per_s = arguments.copy_gb_per_s * 1e9
    return {
        "name": arguments.out.stem,
        "model": f"{profile.model}, {profile.dtype}",
        "accelerator": arguments.accelerator,
        "source": (
            f"llumsched profile: {len(profile.steps)} steps of one vLLM engine on"
            f" {profile.device}, one at a time, prefix caching and asynchronous scheduling off."
        ),
        "fit_error": round(fitted.held_out_error, 4),
        "boot_s": round(profile.boot_s, 1),
        "kv": {
            "num_blocks": profile.num_blocks,
            "block_size": profile.block_size,
            "bytes_per_token": profile.kv_bytes_per_token,
        },
        "step": {
            "kv_token_s": float(f"{step.kv_token_s:.4g}"),
            "skew_token_s": float(f"{step.skew_token_s:.4g}"),
            "prefill_pair_s": float(f"{step.prefill_pair_s:.4g}"),
            "table": [list(point) for point in step.table],
        },
        "copy": {"token_s": float(f"{profile.kv_bytes_per_token / bytes_per_s:.4g}")},
        "measured": {
            "batch_tokens": max(tokens),
            "requests": max(s.num_decodes for s in profile.steps),
            "kv_tokens": max(1, max(s.num_kv_tokens for s in profile.steps)),
        },
        **_shape(profile),
        "notes": [
            _HOST_NOTE,
            f"KV copies were not measured; --copy-gb-per-s said {arguments.copy_gb_per_s:g} GB/s.",
        ],
    }


def _shape(profile: Any) -> dict[str, Any]:
    """By which `llumsched hardware` scales to another model; nothing for shapes it cannot read."""
    try:
        shape = shape_of(profile.model_config, source=profile.model)
    except ShapeError:
        return {}
    return {"shape": dataclasses.asdict(shape.compute)}
