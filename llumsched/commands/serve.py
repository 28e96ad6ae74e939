"""``llumsched serve MODEL``: the arguments are vLLM's, parsed by vLLM's parser."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from llumsched import __version__, logs
from llumsched.commands._vllm import refuses_vllm

logger = logging.getLogger(__name__)

PASSTHROUGH = True


def main(argv: Sequence[str]) -> int:
    if refuses_vllm("serve", argv):
        return 2
    if not {"-h", "--help"} & {argument.partition("=")[0] for argument in argv}:
        # vLLM takes long to import, and longer on a machine that is busy.
        logs.set_up("llumsched", logs.options_of(argv))
        logger.info("llumsched %s: importing vLLM, then checking the arguments", __version__)
    logs.prepare_ray()
    from llumsched.frontend import server

    status = server.main(argv)
    # Everything has been ended in order. What is left are the finalizers of the libraries vLLM
    # loads, which take seconds and print pages about themselves.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
