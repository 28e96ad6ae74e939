"""Vetting of the installed vLLM, by every command that imports it, before it does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llumsched.commands._torch_addons import check_torch_addons

ALLOW_OTHER_VLLM = "--allow-other-vllm"


def refuses_vllm(command: str, argv: Sequence[str]) -> bool:
    """True if the installed vLLM is not one that this works with; a sentence says so.

    What has moved in it would be a traceback. ``--allow-other-vllm`` makes it a warning.

    Raises:
        CommandError: if vLLM could not load a model.
        ModuleNotFoundError: if it is not installed.
    """
    from llumsched.engine.vllm.compat import UnsupportedVersion
    from llumsched.engine.vllm.version_check import check_version

    try:
        check_version(allow_other=ALLOW_OTHER_VLLM in argv)
    except UnsupportedVersion as error:
        sys.stderr.write(f"llumsched {command}: {error}\n")
        return True
    check_torch_addons()
    return False
