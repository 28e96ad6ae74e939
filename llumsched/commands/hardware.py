"""``llumsched hardware``: what the simulator can model, and another model on the same."""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from llumsched.commands import CommandError
from llumsched.core.params import ParamError
from llumsched.simulator.engines.cost import StepCost, copy_ps
from llumsched.simulator.hardware.model_shape import ShapeError, read_shape
from llumsched.simulator.hardware.rescale import Other, rescale
from llumsched.simulator.hardware.spec import (
    Hardware,
    HardwareError,
    available,
    load_hardware,
)
from llumsched.simulator.hardware.yaml_text import hardware_text
from llumsched.simulator.kernel import PS_PER_S

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# What times are shown of: tokens of a prompt, tokens of context of each request, requests.
_PROMPT = 1024
_CONTEXT = 1024
_BATCHES = (1, 32)
_ROW = "{:24} {:24} {:>7}  {}"


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "hardware",
        help="list the modelled hardware, show one, or scale it to another model",
        description=(
            "List the hardware files that ship, or show what one says. With BASE and"
            " --model-config, write one for another model on the same accelerator: the times of"
            " BASE scaled by parameters, bytes of KV (multi-head, grouped-query or latent"
            " attention) and attention heads. It is an estimate, and says so; a mixture of"
            " experts, and a model so small that the host decides, are refused. 'llumsched profile'"
            " measures."
        ),
    )
    parser.add_argument("base", nargs="?", metavar="BASE", help="a name of the list, or a file")
    parser.add_argument(
        "--model-config", type=Path, metavar="FILE", help="the config.json of the other model"
    )
    parser.add_argument(
        "--num-kv-blocks", type=int, metavar="N", help="KV blocks of an instance, as vLLM logs them"
    )
    parser.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens of a block (default: 16)"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="times as many accelerators as BASE has (default: 1)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="NAME.yaml (default: print it)")
    return parser


def run(args: argparse.Namespace) -> int:
    """List, or write the file."""
    try:
        if args.model_config is None:
            if args.base is None:
                _list(available())
            else:
                _show(load_hardware(args.base))
        else:
            _write(args)
    except (HardwareError, ShapeError, ParamError) as error:
        raise CommandError(str(error)) from error
    return 0


def _list(names: tuple[str, ...]) -> None:
    every = [load_hardware(name) for name in names]
    print(_ROW.format("NAME", "MODEL", "BLOCKS", "ACCELERATOR"))
    for found in every:
        print(_ROW.format(found.name, found.model, found.kv.num_blocks, found.accelerator))


def _show(hardware: Hardware) -> None:
    """Print the content of one file, with the times that a planner asks for."""
    kv, measured = hardware.kv, hardware.measured
    error = (
        "" if math.isnan(hardware.fit_error) else f"; the fit is off by {hardware.fit_error:.1%}"
    )
    costs = StepCost(hardware.step, _PROMPT)
    prompt = costs.step(
        num_prefill_tokens=_PROMPT, twice_prefill_pairs=_PROMPT**2, num_decodes=0, num_kv_tokens=0
    )
    rows = {
        "model": hardware.model,
        "accelerator": hardware.accelerator,
        "source": " ".join(hardware.source.split()) + error,
        "KV cache": f"{kv.num_blocks:,} blocks of {kv.block_size}, {hardware.num_kv_tokens:,}"
        f" tokens, {hardware.num_kv_tokens * kv.bytes_per_token / 2**30:.1f} GiB",
        f"a prompt of {_PROMPT:,}": f"{1e3 * prompt / PS_PER_S:.1f} ms",
        **{
            f"a step of {num} decodes": f"{1e3 * _decode_s(costs, num):.1f} ms, each with"
            f" {_CONTEXT:,} tokens of context"
            for num in _BATCHES
        },
        "to copy its KV": f"{1e3 * copy_ps(hardware.copy, _CONTEXT) / PS_PER_S:.1f} ms for"
        f" {_CONTEXT:,} tokens",
        "to boot": f"{hardware.boot_s:g} s",
        "measured up to": f"{measured.batch_tokens:,} tokens and {measured.requests:,} requests in"
        f" a step, {measured.kv_tokens:,} tokens of context",
        **({"notes": " ".join(hardware.notes)} if hardware.notes else {}),
    }
    width = max(map(len, rows))
    print(hardware.name)
    for name, text in rows.items():
        margin = f"  {name.ljust(width)}  "
        print(textwrap.fill(text, 100, initial_indent=margin, subsequent_indent=" " * len(margin)))


def _decode_s(costs: StepCost, num_decodes: int) -> float:
    step = costs.step(
        num_prefill_tokens=0,
        twice_prefill_pairs=0,
        num_decodes=num_decodes,
        num_kv_tokens=num_decodes * _CONTEXT,
    )
    return step / PS_PER_S


def _write(args: argparse.Namespace) -> None:
    if args.base is None or args.num_kv_blocks is None:
        raise CommandError("--model-config needs BASE, the hardware to scale, and --num-kv-blocks")
    if args.tensor_parallel < 1:
        raise CommandError("--tensor-parallel must be at least 1")
    if args.out is not None and args.out.suffix != ".yaml":
        raise CommandError(f"--out {args.out}: it must end in .yaml")
    base = load_hardware(args.base)
    model = args.model_config.resolve().parent.name
    scaled = rescale(
        base,
        Other(
            name=args.out.stem if args.out else f"{base.name}-as-{model}",
            model=f"{model}, 16-bit KV",
            shape=read_shape(args.model_config),
            share=read_shape(args.model_config, tensor_parallel=args.tensor_parallel),
            num_accelerators=args.tensor_parallel,
            num_blocks=args.num_kv_blocks,
            block_size=args.block_size,
        ),
    )
    text = hardware_text(scaled)
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text, encoding="utf-8")
        print(f"written: {args.out}\n{scaled.notes[0]}")
