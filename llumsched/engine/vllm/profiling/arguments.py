"""The flags of vLLM's engine, for an engine that is measured."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser


def engine_arguments(model: str, flags: Sequence[str]) -> EngineArgs:
    """vLLM's own reading of these flags; a mistake in them ends the program with its message."""
    parser = EngineArgs.add_cli_args(
        FlexibleArgumentParser(prog="llumsched profile", allow_abbrev=False)
    )
    parsed = parser.parse_args(["--model", model, *flags])
    arguments: EngineArgs = EngineArgs.from_cli_args(parsed)
    return arguments
