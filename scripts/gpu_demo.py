"""`make gpu-demo`: two instances on one GPU, full batches, requests that move all the time.

Every answer is compared with the one that the same question gets alone: vLLM's batch-invariant
mode computes a request of a full batch as it computes one alone, so not a token may differ. It
takes five minutes at most. With `--device cpu` the same is shown in small, on CPU engines.

Only the standard library is imported until it is known that all it takes is there.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llumsched.flags import Parser

# Made by the drivers of NVIDIA and of AMD.
GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

CLOSING = (
    "Next: `llumsched serve MODEL --instances 2 --gpus-per-instance 0.5` keeps two instances up on"
    " this GPU, and `llumsched status` shows them; docs/serving.md has the rest."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is asked of the two instances, and for how long.

    ``num_streams`` answers of ``max_tokens`` are under way at a time, almost as many as the two
    batches of ``max_num_seqs`` hold: an instance takes no arrival that its batch has no place for.
    They stay for ``still_s``, then move for ``moving_s``; both are shorter if booting has taken so
    long that all would not be over in ``total_s``.
    """

    flags: tuple[str, ...]
    max_num_seqs: int
    num_streams: int
    num_questions: int
    max_tokens: int
    still_s: float
    moving_s: float
    total_s: float = 290.0


SIZES = {
    "gpu": Size(
        flags=("--gpus-per-instance 0.5", "--dtype bfloat16", "--max-model-len 2048"),
        max_num_seqs=32,
        num_streams=62,
        num_questions=12,
        max_tokens=192,
        still_s=20.0,
        moving_s=90.0,
    ),
    "cpu": Size(
        flags=(
            "--dtype float32",
            "--enforce-eager",
            "--block-size 32",
            "--num-gpu-blocks-override 160",
            "--max-model-len 1024",
        ),
        max_num_seqs=3,
        num_streams=5,
        num_questions=4,
        max_tokens=32,
        still_s=15.0,
        moving_s=40.0,
    ),
}


def missing(device: str) -> str | None:
    """Name what keeps the demo from running here, with the fix; ``None`` if nothing does.

    Without vLLM only the device is looked at.
    """
    in_small = "GPU_DEMO_ARGS='--device cpu' shows the same in small on CPU engines"
    if device == "cpu":
        return None
    if not any(Path(path).exists() for path in GPU_DEVICES):
        return (
            "this machine has no GPU, or no driver for one; `make EXTRA=cpu gpu-demo` with "
            f"{in_small}."
        )
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return (
            f"PyTorch {torch.__version__} cannot use this machine's GPU: install vLLM for GPUs "
            f"(`make distclean gpu-demo`); with {in_small}."
        )
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the demo; exit status 0 only if all that is claimed held."""
    parser = Parser(prog="python -m scripts.gpu_demo", description=__doc__)
    parser.add_argument("--device", choices=tuple(SIZES), default="gpu")
    parser.add_argument(
        "--model", default="smollm2", help="'smollm2' (default), a hub name or a model folder"
    )
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    arguments = parser.parse_args(argv)
    complaint = missing(arguments.device)
    if complaint is not None:
        print(f"gpu-demo: {complaint}", file=sys.stderr)
        return 1
    return 0 if arguments.check else _run(arguments.model, SIZES[arguments.device])


def _run(wanted_model: str, size: Size) -> int:
    from scripts.demo import full_batch
    from scripts.demo.running import machine, run
    from scripts.demo.screen import Screen
    from scripts.demo.server import Server
    from scripts.prepare_model import default_cache_dir, prepare_model

    if "--gpus-per-instance 0.5" in size.flags:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    screen = Screen()
    screen.title("llumsched: requests that move all the time, under full batches")
    screen.paragraph(machine())
    try:
        model = prepare_model(wanted_model)
    except RuntimeError as error:
        screen.check(False, str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    flags = (
        "--instances 2",
        # It moves nothing by itself: every move is one that is asked for here.
        "--policy round_robin",
        f"--max-num-seqs {size.max_num_seqs}",
        *size.flags,
        "--disable-uvicorn-access-log",
    )
    server = Server(model, flags, default_cache_dir() / "gpu-demo-server.log")
    load = full_batch.Load(
        max_num_seqs=size.max_num_seqs,
        num_streams=size.num_streams,
        num_questions=size.num_questions,
        max_tokens=size.max_tokens,
        still_s=size.still_s,
        moving_s=size.moving_s,
        ends_at_s=time.monotonic() + size.total_s,
    )
    try:
        return asyncio.run(run(screen, server, load.act, closing=CLOSING, timeout_s=size.total_s))
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(main())
