"""Internals of vLLM that this project uses beyond its public interface.

Any of it may move with any release of vLLM, and a silent change could corrupt a stream rather than
fail. So the lists name all that is called, overridden, read, or only relied on; ``version_check``
compares them with the installed version at every start, and ``make vllm-diff`` with any other.
"""

from __future__ import annotations

from llumsched.engine.vllm.internals.configuration import CONFIGURATION
from llumsched.engine.vllm.internals.engine import ENGINE_INTERNALS
from llumsched.engine.vllm.internals.entry import Internal
from llumsched.engine.vllm.internals.frontend import FRONTEND_INTERNALS
from llumsched.engine.vllm.internals.relied_on import RELIED_ON

INTERNALS: tuple[Internal, ...] = (
    *ENGINE_INTERNALS,
    *FRONTEND_INTERNALS,
    *CONFIGURATION,
    *RELIED_ON,
)

__all__ = ["INTERNALS", "Internal"]
