"""Where an instance's engine is built: the one line that an engine takes outside its own folder."""

from __future__ import annotations

from llumsched.engine.base import InstanceEngine
from llumsched.engine.vllm.core import EngineSettings
from llumsched.engine.vllm.instance_engine import VllmEngine
from llumsched.wire.keys import PoolKeys

__all__ = ["EngineSettings", "build_engine"]


def build_engine(
    settings: EngineSettings, *, instance_id: str, keys: PoolKeys, reports_prefix_blocks: bool
) -> InstanceEngine:
    """Load the model; takes as long as that does.

    Args:
        keys: the pool's, which the engine's own sockets prove themselves by.
        reports_prefix_blocks: needs an engine that records KV events.
    """
    return VllmEngine(
        settings, instance_id=instance_id, keys=keys, reports_prefix_blocks=reports_prefix_blocks
    )
