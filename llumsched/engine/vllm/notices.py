"""Lines of vLLM's own that mislead whoever started ``llumsched serve``: told otherwise, or not.

This module does not import vLLM: it is called before that.
"""

from __future__ import annotations

import logging

# Not worth a line before every other: a CPU build computes without Triton.
NEEDLESS = {"vllm.triton_utils.importing": "Triton is installed, but doesn't include CPU backend."}
# They name the program that reads the flags.
OF_THE_PROGRAM = ("vllm.entrypoints.scale_out.factories",)


def _is_needed(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NEEDLESS[record.name])


def _names_this_program(record: logging.LogRecord) -> bool:
    record.msg = str(record.msg).replace("vllm serve", "llumsched serve")
    return True


def put_right() -> None:
    """Set the filters in this process; may be called again."""
    for name in NEEDLESS:
        logging.getLogger(name).addFilter(_is_needed)
    for name in OF_THE_PROGRAM:
        logging.getLogger(name).addFilter(_names_this_program)
