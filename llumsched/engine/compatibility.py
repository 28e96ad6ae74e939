"""Properties that two instances must share for KV to move between them, compared one by one.

Compared once, when two instances first meet, and over the whole pool when it starts. As a text (a
*fingerprint*) it goes into messages that need not know what it consists of.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

# Counts changes of the messages and of the state that travels with a request.
PROTOCOL_VERSION = 5


class Compatibility(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, as far as its KV and its requests are another's to take over.

    ``kv_layout`` names the order of a block's bytes in memory and the sizes of its pages;
    ``kv_spec`` is what vLLM says a block holds; ``drafter`` names whose KV it holds beside the
    model's.
    """

    protocol: int
    vllm: str
    model: str
    revision: str
    quantization: str
    dtype: str
    max_model_len: int
    block_size: int
    kv_dtype: str
    kv_spec: tuple[str, ...]
    kv_layout: str
    attention_backend: str
    tensor_parallel: int
    pipeline_parallel: int
    model_runner: int
    lora: bool
    drafter: str = ""


def fingerprint_of(compatibility: Compatibility) -> str:
    """The same as a text."""
    return msgspec.json.encode(compatibility).decode()


def differences(here: str, there: str) -> str:
    """In what two fingerprints differ, as a sentence without its full stop; empty if in nothing."""
    if here == there:
        return ""
    try:
        a, b = (msgspec.json.decode(text, type=Compatibility) for text in (here, there))
    except msgspec.DecodeError:
        return "it runs another version of llumsched"
    return ", ".join(
        f"{name} is {getattr(a, name)!r} here and {getattr(b, name)!r} there"
        for name in Compatibility.__struct_fields__
        if getattr(a, name) != getattr(b, name)
    )


def differences_in_pool(fingerprints: Mapping[str, str]) -> str:
    """Reasons why the instances of a pool cannot exchange requests, in two sentences that say what
    to change; empty if nothing does.

    Args:
        fingerprints: one or more, by instance id. All are compared with the first.
    """
    first_id, first = next(iter(fingerprints.items()))
    for instance_id, other in fingerprints.items():
        differing = differences(first, other)
        if differing:
            return (
                f"Instances {first_id} and {instance_id} cannot exchange requests: {differing} "
                f"(here: {first_id}). Give every instance the same model, flags and vLLM."
            )
    return ""
