"""Two instances are compared field by field; a difference is named."""

from __future__ import annotations

import msgspec

from llumsched.engine.compatibility import Compatibility, differences, fingerprint_of

HERE = Compatibility(
    protocol=2,
    vllm="0.32.0",
    model="m",
    revision="",
    quantization="",
    dtype="float32",
    max_model_len=1024,
    block_size=32,
    kv_dtype="auto",
    kv_spec=("full attention",),
    kv_layout="30x[(3, 32, 128)]",
    tensor_parallel=1,
    pipeline_parallel=1,
    model_runner=1,
    lora=False,
)


def test_alike() -> None:
    assert differences(fingerprint_of(HERE), fingerprint_of(HERE)) == ""


def test_every_difference_is_named() -> None:
    there = msgspec.structs.replace(HERE, block_size=64, kv_dtype="fp8")
    assert differences(fingerprint_of(HERE), fingerprint_of(there)) == (
        "block_size is 32 here and 64 there, kv_dtype is 'auto' here and 'fp8' there"
    )


def test_what_cannot_be_read_is_another_version() -> None:
    assert differences(fingerprint_of(HERE), "vllm 0.1") == "it runs another version of llumsched"
    assert differences(fingerprint_of(HERE), "{}") == "it runs another version of llumsched"
