"""Every flag of ``vllm serve`` reaches the engines or the server, or is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from llumsched.engine.vllm.compat import CLI_ARGS, first_of
from llumsched.frontend.options.arguments import UsageError, parse
from llumsched.frontend.options.refused_flags import REFUSED
from llumsched.frontend.server import _engine_config
from scripts.prepare_model import prepare_model

FrontendArgs = first_of(CLI_ARGS, "FrontendArgs")
# What is read by neither, with who reads it here.
READ_BY_NAME = {
    "help": "the parser",
    "model_tag": "arguments",
    "config": "the parser",
}
# A value of each flag that is refused.
VALUES = {
    "data_parallel_rank": ["0"],
    "data_parallel_start_rank": ["0"],
    "data_parallel_size_local": ["1"],
    "data_parallel_address": ["10.0.0.1"],
    "data_parallel_rpc_port": ["1234"],
    "data_parallel_backend": ["ray"],
    "data_parallel_supervisor_port": ["1234"],
    "dp_supervisor_probe_interval_s": ["7"],
    "dp_supervisor_probe_timeout_s": ["7"],
    "dp_supervisor_probe_failure_threshold": ["7"],
    "pipeline_parallel_size": ["2"],
    "nnodes": ["2"],
    "node_rank": ["1"],
    "master_addr": ["10.0.0.1"],
    "master_port": ["1234"],
    "api_server_count": ["2"],
    "grpc_port": ["1234"],
    "distributed_executor_backend": ["ray"],
    "device_ids": ["0"],
    "numa_bind_nodes": ["0"],
    "numa_bind_cpus": ["0-1"],
    "mm_tensor_ipc": ["torch_shm"],
    "mm_processor_cache_type": ["shm"],
}


@pytest.fixture(scope="module")
def model() -> str:
    return prepare_model()


def names_of_vllm() -> set[str]:
    parser = first_of(CLI_ARGS, "make_arg_parser")(FlexibleArgumentParser(prog="vllm serve"))
    return {action.dest for action in parser._actions}


def test_every_flag_is_honoured_or_refused() -> None:
    fields = {
        field.name for of in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(of)
    }
    refused = {entry.name for entry in REFUSED}
    unknown = names_of_vllm() - fields - refused - READ_BY_NAME.keys()
    assert unknown == set(), "find who reads these in vLLM, and honour or refuse them"


def test_whatever_is_for_several_ranks_or_machines_is_refused() -> None:
    """Engine arguments that vLLM's launcher reads, not its engines."""
    of_launchers = {
        name
        for name in names_of_vllm()
        if name.startswith(("data_parallel_", "dp_supervisor", "numa_bind", "node_rank", "nnodes"))
    }
    assert of_launchers - {"data_parallel_size"} <= {entry.name for entry in REFUSED}


@pytest.mark.parametrize("name", [entry.name for entry in REFUSED])
def test_a_flag_that_would_not_be_honoured_is_refused(name: str) -> None:
    (entry,) = (entry for entry in REFUSED if entry.name == name)
    if name not in names_of_vllm():
        pytest.skip("this version of vLLM has no such flag")
    with pytest.raises(UsageError) as refused:
        parse(["m/m", entry.flag, *VALUES.get(name, [])])
    assert str(refused.value).startswith(("--", "Error: --")), refused.value
    assert entry.flag in str(refused.value)


@pytest.mark.parametrize("more", [[], ["--instances=3"]])
def test_data_parallel_ranks_are_instances(more: list[str]) -> None:
    args, options = parse(["m/m", "--data-parallel-size=3", *more])
    assert options.num_instances == 3
    assert args.data_parallel_size == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--enable-expert-parallel", "take every step together"),
        ("--instances=4", "leave one of them out"),
    ],
)
def test_data_parallel_ranks_that_are_no_instances(more: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse(["m/m", "--data-parallel-size=3", more])


def test_values_that_are_the_default_are_taken() -> None:
    parse(["m/m", "--data-parallel-size=1", "--nnodes=1", "--distributed-executor-backend=mp"])


def test_a_frontend_relies_on_no_instance_to_have_kept_an_image(model: str) -> None:
    """There may be others, though there is but one frontend."""
    args, options = parse([model])
    assert _engine_config(args, options.num_frontends).parallel_config._api_process_count > 1


def test_a_flag_of_the_server_that_engines_must_know_reaches_them(model: str) -> None:
    args, options = parse([model, "--no-enable-flash-late-interaction"])
    pooler = _engine_config(args, options.num_frontends).model_config.pooler_config
    assert pooler is None or not pooler.enable_flash_late_interaction


def test_the_time_that_requests_have_to_finish_reaches_servers_and_engines(model: str) -> None:
    args, options = parse([model, "--shutdown-timeout=25"])
    assert _engine_config(args, options.num_frontends).shutdown_timeout == 25
