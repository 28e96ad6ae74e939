"""``llumsched hardware``: what the simulator can model, and another model on the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llumsched.commands import CommandError
from llumsched.core.params import ParamError
from llumsched.simulator.hardware.model_shape import ShapeError, read_shape
from llumsched.simulator.hardware.rescale import Other, rescale
from llumsched.simulator.hardware.spec import HardwareError, available, load_hardware
from llumsched.simulator.hardware.yaml_text import hardware_text

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_ROW = "{:24} {:24} {:>7}  {}"


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "hardware",
        help="list the modelled hardware, or scale it to another model",
        description=(
            "List the hardware files that ship. With BASE and --model-config, write one for another"
            " model on the same accelerator: the times of BASE scaled by parameters, bytes of KV"
            " (multi-head, grouped-query or latent attention) and attention heads. It is an"
            " estimate, and says so; a mixture of experts, and a model so small that the host"
            " decides, are refused. 'llumsched profile' measures."
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
            _list((args.base,) if args.base else available())
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
