"""``llumsched serve MODEL``: the arguments are vLLM's, parsed by vLLM's parser."""

from __future__ import annotations

from collections.abc import Sequence

PASSTHROUGH = True


def main(argv: Sequence[str]) -> int:
    from llumsched.frontend import server

    return server.main(argv)
