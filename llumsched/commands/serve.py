"""``llumsched serve MODEL``: the arguments are vLLM's, parsed by vLLM's parser.

With ``--backend`` or ``--backends`` it serves plain servers of any engine, and needs no vLLM.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from llumsched import __version__, logs
from llumsched.commands._vllm import refuses_vllm

logger = logging.getLogger(__name__)

PASSTHROUGH = True

# They make it a proxy.
BACKEND_FLAGS = frozenset({"--backend", "--backends"})


def main(argv: Sequence[str]) -> int:
    if names_backends(argv):
        from llumsched.proxy import serve

        return serve.main(argv)
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


def names_backends(argv: Sequence[str]) -> bool:
    """True if a command line of ``serve`` names plain servers."""
    return any(argument.partition("=")[0] in BACKEND_FLAGS for argument in argv)
