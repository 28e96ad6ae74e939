"""Ports, paths and sockets that flags of ``vllm serve`` name for one engine of several.

What an instance can have beside the others gets an address of its own; what only one engine of a
machine can have is refused where there may be several. A flag that names something only read, or
where each engine connects as a client, means the same for all of them. A test holds every flag of
vLLM that names such a thing to this list.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig

from llumsched.frontend.options.arguments import UsageError

# Connectors that listen at a port of the machine, which a flag or a variable names once.
LISTENING_CONNECTORS = frozenset(
    {
        "LMCacheMPConnector",
        "MoRIIOConnector",
        "MooncakeConnector",
        "MooncakeStoreConnector",
        "NixlConnector",
        "NixlPullConnector",
        "NixlPushConnector",
    }
)


def check_shared(vllm_config: VllmConfig, num_instances: int) -> None:
    """Refuse what the second of several instances could not have.

    Raises:
        UsageError: naming the flag and the fix.
    """
    if num_instances == 1:
        return
    transfer = vllm_config.kv_transfer_config
    if transfer is not None:
        described = {
            "kv_connector": transfer.kv_connector,
            "kv_connector_extra_config": transfer.kv_connector_extra_config,
        }
        for name in _connectors(described):
            if name in LISTENING_CONNECTORS:
                raise _for_one(f"--kv-transfer-config: {name} listens at one port of a machine")
    if vllm_config.ec_transfer_config is not None:
        raise _for_one("--ec-transfer-config names one port of a machine")
    multimodal = vllm_config.model_config.multimodal_config
    if getattr(multimodal, "mm_encoder_fp8_scale_save_path", None):
        raise _for_one("--mm-encoder-fp8-scale-save-path names one file, which each would write")


def for_instance(vllm_config: VllmConfig, index: int) -> VllmConfig:
    """The configuration with the addresses of the instance of this number."""
    events = vllm_config.kv_events_config
    if events is None or events.publisher != "zmq":
        return vllm_config
    changed = copy.copy(vllm_config)
    changed.kv_events_config = replace(
        events,
        endpoint=_own(events.endpoint, index),
        replay_endpoint=events.replay_endpoint and _listening(events.replay_endpoint, index),
    )
    return changed


def _own(endpoint: str, index: int) -> str:
    """Where an instance publishes; where vLLM connects to a subscriber, all connect to it."""
    is_bound = "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))
    return _listening(endpoint, index) if is_bound else endpoint


def _listening(endpoint: str, index: int) -> str:
    """``tcp://*:5557`` is port 5558 for instance-1, as it is for vLLM's own data-parallel ranks."""
    base, colon, port = endpoint.rpartition(":")
    if endpoint.startswith("tcp://") and colon and port.isdigit():
        return f"{base}:{int(port) + index}" if int(port) else endpoint
    return f"{endpoint}-{index}" if index else endpoint


def _connectors(described: Mapping[str, Any]) -> Iterator[str]:
    """The names of a connector and of those that it is made of."""
    yield str(described.get("kv_connector"))
    for part in (described.get("kv_connector_extra_config") or {}).get("connectors", ()):
        yield from _connectors(part)


def _for_one(why: str) -> UsageError:
    return UsageError(
        f"{why}, so there can be one instance only: give --instances 1 and no --max-instances,"
        " or leave the flag out."
    )
