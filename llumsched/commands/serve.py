"""``llumsched serve MODEL``: the arguments are vLLM's, parsed by vLLM's parser."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

PASSTHROUGH = True


def main(argv: Sequence[str]) -> int:
    from llumsched.frontend import server

    status = server.main(argv)
    # Everything has been ended in order. What is left are the finalizers of the libraries vLLM
    # loads, which take seconds and print pages about themselves.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
