"""Two instances are compared field by field; a difference is named."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llumsched.engine.compatibility import (
    Compatibility,
    differences,
    differences_in_pool,
    fingerprint_of,
)
from tests.engine.fingerprints import HERE


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


def test_a_pool_is_alike() -> None:
    assert differences_in_pool({"a": fingerprint_of(HERE)}) == ""
    assert differences_in_pool(dict.fromkeys("abc", fingerprint_of(HERE))) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol", 1),
        ("vllm", "0.31.0"),
        ("model", "another"),
        ("revision", "of last year"),
        ("quantization", "awq"),
        ("dtype", "bfloat16"),
        ("max_model_len", 2048),
        ("block_size", 64),
        ("kv_dtype", "fp8"),
        ("kv_spec", ("sliding window",)),
        ("kv_layout", "LBNHC: 30 x 24576 bytes"),
        ("attention_backend", "FLASH_ATTN"),
        ("tensor_parallel", 2),
        ("pipeline_parallel", 2),
        ("model_runner", 2),
        ("lora", True),
        ("drafter", "eagle head"),
    ],
)
def test_a_pool_in_which_one_differs_is_refused(field: str, value: Any) -> None:
    """Every field counts; both instances and both values are named, and what to do."""
    here, odd = (fingerprint_of(x) for x in (HERE, msgspec.structs.replace(HERE, **{field: value})))
    found = differences_in_pool({"first": here, "second": here, "odd": odd})
    assert found == (
        f"Instances first and odd cannot exchange requests: {field} is {getattr(HERE, field)!r} "
        f"here and {value!r} there (here: first). Give every instance the same model, flags and "
        "vLLM."
    )


def test_every_field_is_tried_above() -> None:
    (mark,) = test_a_pool_in_which_one_differs_is_refused.pytestmark
    assert [field for field, _ in mark.args[1]] == list(Compatibility.__struct_fields__)
