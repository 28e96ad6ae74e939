"""Where an instance's engine is built: the one line that an engine takes outside its own folder."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from llumsched.engine.base import EngineSettings, InstanceEngine
from llumsched.wire.keys import PoolKeys

ENGINES = {
    "vllm": "llumsched.engine.vllm.instance_engine:VllmEngine",
}
"""By the name that an engine's settings have: its class, which is called with what
`build_engine` is."""


def build_engine(
    settings: EngineSettings, *, instance_id: str, keys: PoolKeys, reports_prefix_blocks: bool
) -> InstanceEngine:
    """Load the model; takes as long as that does.

    Args:
        keys: the pool's, which the engine's own sockets prove themselves by.
        reports_prefix_blocks: needs an engine that records KV events.
    """
    module, _, name = ENGINES[settings.engine].partition(":")
    engine = getattr(import_module(module), name)(
        settings, instance_id=instance_id, keys=keys, reports_prefix_blocks=reports_prefix_blocks
    )
    return cast(InstanceEngine, engine)
