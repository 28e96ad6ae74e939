"""Ports, paths and sockets that a flag names once, where there are several instances."""

from __future__ import annotations

import argparse
import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.config
from vllm.config import KVEventsConfig, KVTransferConfig, VllmConfig

from llumsched.frontend.options.arguments import UsageError
from llumsched.frontend.options.refused_flags import REFUSED
from llumsched.frontend.options.shared_endpoints import check_shared, for_instance
from tests.frontend.test_refused_flags import names_of_vllm

NAMES = re.compile(
    r"(^|_)(port|path|socket|dir|folder|file|endpoint|address|uds|host|ip|addr|url)(_list)?$"
)
# Whatever names such a thing, and what becomes of it where there are several instances.
TREATED = {
    # Flags that are not of a configuration.
    "port": "the server's",
    "host": "the server's",
    "uds": "the server's",
    "root_path": "the server's",
    "enable_tokenizer_info_endpoint": "the server's",
    "log_config_file": "the server's",
    "grpc_port": "refused",
    "data_parallel_supervisor_port": "refused",
    "data_parallel_address": "refused",
    "data_parallel_rpc_port": "refused",
    "master_port": "refused",
    "master_addr": "refused",
    # Of configurations.
    "CompilationConfig.debug_dump_path": "written alike by all",
    "CompilationConfig.cache_dir": "a cache, which engines share",
    "CompilationConfig.local_cache_dir": "a cache, which engines share",
    "ECTransferConfig.ec_ip": "check_shared",
    "ECTransferConfig.ec_port": "check_shared",
    "ECTransferConfig.ec_connector_module_path": "only read",
    "KVEventsConfig.endpoint": "for_instance",
    "KVEventsConfig.replay_endpoint": "for_instance",
    "KVTransferConfig.kv_ip": "check_shared",
    "KVTransferConfig.kv_port": "check_shared",
    "KVTransferConfig.kv_connector_module_path": "only read",
    "LoadConfig.download_dir": "a cache, which engines share",
    "LoggingConfig.pylogging_config_file": "only read",
    "ModelConfig.hf_config_path": "only read",
    "ModelConfig.allowed_local_media_path": "only read",
    "MultiModalConfig.mm_encoder_fp8_scale_path": "only read",
    "MultiModalConfig.mm_encoder_fp8_scale_save_path": "check_shared",
    "ObservabilityConfig.otlp_traces_endpoint": "connected to",
    "ParallelConfig.data_parallel_master_ip": "refused",
    "ParallelConfig.data_parallel_rpc_port": "refused",
    "ParallelConfig.data_parallel_master_port": "refused",
    "ParallelConfig._data_parallel_master_port_list": "refused",
    "ParallelConfig._coord_store_port": "refused",
    "ParallelConfig.master_addr": "refused",
    "ParallelConfig.master_port": "refused",
    "ProfilerConfig.torch_profiler_dir": "files of a folder, named after process and time",
    "ProfilerConfig.proton_profiler_dir": "files of a folder, named after process and time",
}


def named_by_configurations() -> set[str]:
    found = set()
    for name, value in vars(vllm.config).items():
        if isinstance(value, type) and dataclasses.is_dataclass(value) and name.endswith("Config"):
            fields = (field.name for field in dataclasses.fields(value))
            found |= {f"{name}.{field}" for field in fields if NAMES.search(field)}
    return found


def test_every_flag_that_names_a_port_or_a_path_is_treated() -> None:
    fields = {name.rpartition(".")[2] for name in TREATED}
    flags = {name for name in names_of_vllm() if NAMES.search(name)}
    unknown = (flags - fields) | (named_by_configurations() - TREATED.keys())
    assert unknown == set(), "what would several instances do with these?"
    refused = {entry.name for entry in REFUSED}
    assert {n for n, what in TREATED.items() if what == "refused" and "." not in n} <= refused


def configured(**parts: Any) -> VllmConfig:
    """As much of a configuration as is looked at."""
    config: Any = SimpleNamespace(
        kv_events_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        model_config=SimpleNamespace(multimodal_config=None),
    )
    vars(config).update(parts)
    found: VllmConfig = config
    return found


@pytest.mark.parametrize(
    ("endpoint", "of_second"),
    [
        ("tcp://*:5557", "tcp://*:5559"),
        ("tcp://[::]:5557", "tcp://[::]:5559"),
        ("ipc:///tmp/events", "ipc:///tmp/events-2"),
        ("tcp://*:0", "tcp://*:0"),  # a port of the system's choice
        ("tcp://10.0.0.1:5557", "tcp://10.0.0.1:5557"),  # a subscriber's, who binds
    ],
)
def test_each_instance_publishes_kv_events_at_an_address_of_its_own(
    endpoint: str, of_second: str
) -> None:
    events = KVEventsConfig(
        enable_kv_cache_events=True, endpoint=endpoint, replay_endpoint="tcp://*:5600"
    )
    config = configured(kv_events_config=events)
    first, second = for_instance(config, 0).kv_events_config, for_instance(config, 2)
    assert first is not None
    assert second.kv_events_config is not None
    assert (first.endpoint, first.replay_endpoint) == (endpoint, "tcp://*:5600")
    assert second.kv_events_config.endpoint == of_second
    assert second.kv_events_config.replay_endpoint == "tcp://*:5602"
    assert config.kv_events_config is events, "the configuration of all is as it was"


def test_without_a_publisher_all_have_the_same_configuration() -> None:
    config = configured(
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    )
    assert for_instance(config, 3) is config


def connector(name: str, **extra: Any) -> KVTransferConfig:
    return KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra)


NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"kv_transfer_config": connector("NixlConnector")}, "--kv-transfer-config: NixlConnector"),
        (
            {"kv_transfer_config": connector("MultiConnector", connectors=[NIXL])},
            "--kv-transfer-config: NixlConnector listens",
        ),
        ({"ec_transfer_config": object()}, "--ec-transfer-config names one port"),
        (
            {
                "model_config": argparse.Namespace(
                    multimodal_config=SimpleNamespace(mm_encoder_fp8_scale_save_path="x")
                )
            },
            "--mm-encoder-fp8-scale-save-path names one file",
        ),
    ],
)
def test_what_the_second_instance_could_not_have_is_refused_with_the_fix(
    parts: dict[str, Any], said: str
) -> None:
    config = configured(**parts)
    check_shared(config, 1)
    with pytest.raises(UsageError, match=f"^{said}.*give --instances 1 and no --max-instances"):
        check_shared(config, 2)


def test_a_connector_that_does_not_listen_is_taken() -> None:
    check_shared(configured(kv_transfer_config=connector("OffloadingConnector")), 4)
