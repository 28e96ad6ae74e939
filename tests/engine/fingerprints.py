"""The words of a test instance on itself before another may send it KV."""

from __future__ import annotations

from llumsched.engine.compatibility import Compatibility

HERE = Compatibility(
    protocol=4,
    vllm="0.32.0",
    model="m",
    revision="",
    quantization="",
    dtype="float32",
    max_model_len=1024,
    block_size=32,
    kv_dtype="auto",
    kv_spec=("full attention",),
    kv_layout="LBHNC: 30 x 24576 bytes",
    attention_backend="CPU_ATTN",
    tensor_parallel=1,
    pipeline_parallel=1,
    model_runner=1,
    lora=False,
)
