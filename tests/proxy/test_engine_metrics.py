"""Pages of metrics as engines write them, cut to the names that are read and some others."""

from __future__ import annotations

import pytest

from llumsched.proxy.engine_metrics import ServerLoad, read_load

VLLM = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="1000"} 1.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="m"} 0.0
"""
SGLANG = """# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 4.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{model_name="m"} 2.0
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m"} 0.28
# TYPE sglang:max_total_num_tokens gauge
sglang:max_total_num_tokens{model_name="m"} 445123.0
"""
LMDEPLOY = """# TYPE lmdeploy:num_requests_running gauge
lmdeploy:num_requests_running{engine="0",model_name="m"} 1.0
# TYPE lmdeploy:num_requests_waiting gauge
lmdeploy:num_requests_waiting{engine="0",model_name="m"} 0.0
# TYPE lmdeploy:gpu_cache_usage_perc gauge
lmdeploy:gpu_cache_usage_perc{engine="0",model_name="m"} 0.1
"""
TGI = """# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 5
# TYPE tgi_queue_size gauge
tgi_queue_size 3
# TYPE tgi_request_count counter
tgi_request_count 150
"""
TENSORRT = """# TYPE trtllm_num_requests_running gauge
trtllm_num_requests_running{model_name="m",engine_type="trtllm"} 6
# TYPE trtllm_num_requests_waiting gauge
trtllm_num_requests_waiting{model_name="m",engine_type="trtllm"} 7
# TYPE trtllm_kv_cache_utilization gauge
trtllm_kv_cache_utilization{model_name="m",engine_type="trtllm"} 0.62
"""
LLAMA_CPP = """# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
# HELP llamacpp:requests_deferred Number of requests deferred.
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 4
# TYPE llamacpp:predicted_tokens_seconds gauge
llamacpp:predicted_tokens_seconds nan
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            VLLM,
            ServerLoad(
                engine="vLLM",
                num_running=5,
                num_waiting=1,
                cache_usage=0.375,
                num_cache_tokens=32_000,
            ),
        ),
        (
            SGLANG,
            ServerLoad(
                engine="SGLang",
                num_running=4,
                num_waiting=2,
                cache_usage=0.28,
                num_cache_tokens=445_123,
            ),
        ),
        (
            LMDEPLOY,
            ServerLoad(engine="LMDeploy", num_running=1, num_waiting=0, cache_usage=0.1),
        ),
        (TGI, ServerLoad(engine="TGI", num_running=5, num_waiting=3)),
        (
            TENSORRT,
            ServerLoad(engine="TensorRT-LLM", num_running=6, num_waiting=7, cache_usage=0.62),
        ),
        (LLAMA_CPP, ServerLoad(engine="llama.cpp", num_running=1, num_waiting=4)),
    ],
    ids=["vllm", "sglang", "lmdeploy", "tgi", "tensorrt", "llama.cpp"],
)
def test_a_page_tells_the_load(text: str, expected: ServerLoad) -> None:
    assert read_load(text) == expected


@pytest.mark.parametrize("text", ["", "up 1\n", "<html>not found</html>"])
def test_another_page_tells_nothing(text: str) -> None:
    assert read_load(text) is None
