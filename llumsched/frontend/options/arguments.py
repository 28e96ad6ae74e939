"""``llumsched serve``: vLLM's own parser, with one group of ours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm.config.logging import LoggingConfig

from llumsched.access import is_loopback, serves_admin_api
from llumsched.config import DEFAULT_POLICY, KEYS, Config, build_bundle, load
from llumsched.engine.vllm.compat import CLI_ARGS, accepted, first_of
from llumsched.flags import server_url
from llumsched.frontend.options.parser import ServeParser
from llumsched.frontend.options.refused_flags import refusal, take_data_parallel_size
from llumsched.logs import FORMAT_FLAG, FORMATS, LogOptions
from llumsched.yaml_file import YamlFileError, read_yaml

make_arg_parser = first_of(CLI_ARGS, "make_arg_parser")
validate_parsed_serve_args = first_of(CLI_ARGS, "validate_parsed_serve_args")

# Keys of the scheduler's configuration that no flag of vLLM's has.
SCHEDULER_KEYS = frozenset(KEYS) - {"seed"}

FEWEST_MOST_INSTANCES = 8
# One that ends is noticed at once. These are for one that hangs, and for one that works and gives
# no sign, as on a machine that is starved; the second is vLLM's own limit for a GPU that hangs.
DEFAULT_HEARTBEAT_TIMEOUT_S = 10.0
DEFAULT_STEP_TIMEOUT_S = 300.0

DESCRIPTION = """Serve a model on several vLLM instances behind one OpenAI-compatible server.

The flags of `vllm serve` work as they do there and apply to each instance; what a pool cannot
honour is refused. See --help=llumsched for the flags added here, --help=all for all of them.
"""


class UsageError(Exception):
    """The command line cannot be served; the message names the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Values of llumsched's own flags."""

    num_instances: int
    num_frontends: int
    config: Config
    ray_address: str | None
    any_node: bool
    gpus_per_instance: float | None
    admin_api: bool
    decision_log: Path | None
    heartbeat_timeout_s: float
    step_timeout_s: float
    logs: LogOptions
    config_file: str | None

    @property
    def most_instances(self) -> int:
        """Labels are made for so many, and no more are started."""
        return max(FEWEST_MOST_INSTANCES, 2 * self.num_instances, self.planned_instances)

    @property
    def planned_instances(self) -> int:
        """So many are to share this machine: those that are started, or that scaling may add."""
        return max(self.num_instances, build_bundle(self.config).options.max_instances)

    @property
    def wants_prefix_blocks(self) -> bool:
        """True if the policies ask which instance caches which prefix."""
        return build_bundle(self.config).options.prefix_index_blocks > 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ServeOptions]:
    """vLLM's arguments and ours.

    Raises:
        UsageError: for what vLLM's parser does not catch itself.
    """
    parser: ServeParser = make_arg_parser(
        ServeParser(prog="llumsched serve", description=DESCRIPTION)
    )
    plain: argparse.ArgumentParser = parser
    group = plain.add_argument_group("llumsched", "The pool of instances and its scheduler.")
    group.add_argument(
        "--instances",
        type=int,
        default=1,
        metavar="N",
        help="vLLM instances to start with. With 0, which --min-instances 0 and --max-instances "
        "make possible, the first request has one started, and waits for it. Default: %(default)s.",
    )
    group.add_argument(
        "--min-instances",
        type=int,
        metavar="N",
        help="Scaling never goes below this; at 0 the last instance leaves when it has been idle. "
        "Default: min_instances of the scheduler's configuration, which is 1.",
    )
    group.add_argument(
        "--max-instances",
        type=int,
        metavar="N",
        help="Scale by itself, by the policy's rule, up to this many. Default: max_instances of "
        "the scheduler's configuration, which is 0: no scaling.",
    )
    group.add_argument(
        "--frontends",
        type=int,
        default=1,
        metavar="K",
        help="Processes with vLLM's HTTP server, all at the one port, in front of the same "
        "instances. If one dies, its requests end, the others go on, and another takes its place. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--policy",
        metavar="NAME",
        help="Scheduling policy bundle; `llumsched policies` lists them. Default: "
        f"{DEFAULT_POLICY}. To "
        "change parts of one, give --config a file with the scheduler's configuration (a file "
        "of vLLM's options works as ever; --config may be given once for each).",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster to attach to. Default: the one RAY_ADDRESS or `ray start` names, else "
        "a local one is started and ended with the server.",
    )
    group.add_argument(
        "--any-node",
        action="store_true",
        help="Let instances be on any machine of the Ray cluster; its autoscaler adds machines for "
        "those that find no room. Each machine needs the same llumsched, vLLM and model. Instances "
        "and frontends then listen at their machines' addresses in the cluster, to holders of the "
        "pool's keys only. Default: all instances are on this machine, and listen on loopback.",
    )
    group.add_argument(
        "--gpus-per-instance",
        type=float,
        metavar="F",
        help="A part of a GPU, such as 0.5: two instances share one. --gpu-memory-utilization is "
        "what they take together, --kv-cache-memory-bytes what each has; they boot one after the "
        "other. Only for instances of one worker. Default: a GPU for each worker.",
    )
    group.add_argument(
        "--admin-api",
        choices=("auto", "on", "off"),
        default="auto",
        help="Serve /llumsched/...: status; migrations, drains and scaling by hand. `auto`: only "
        "if nobody but this machine can reach the server (--host a loopback address, or --uds). "
        "With --api-key these paths want the key as well.",
    )
    group.add_argument(
        "--batch-url",
        type=server_url,
        metavar="URL",
        help="Pass /v1/files and /v1/batches on to `llumsched batch` there. Default: not served.",
    )
    group.add_argument(
        "--decision-log",
        metavar="FOLDER",
        help="Keep every event and decision of the scheduler there, for `llumsched replay`; the "
        "oldest are removed. Default: none is kept.",
    )
    group.add_argument(
        FORMAT_FLAG,
        choices=FORMATS,
        help="How every process logs: lines of text, or a JSON object a line, with the ids of "
        "requests, migrations and instances as keys. vLLM's --log-level sets the level of all. "
        "Default: text.",
    )
    group.add_argument(
        "--allow-other-vllm",
        action="store_true",
        help="Start with a vLLM that this release was not written for, or that lacks some of what "
        "is used of it: whatever follows.",
    )
    group.add_argument(
        "--heartbeat-timeout",
        type=float,
        default=DEFAULT_HEARTBEAT_TIMEOUT_S,
        metavar="SECONDS",
        help="An instance whose process gives no sign of life for longer, and is not seen to work, "
        "is killed, its requests go on elsewhere, and another takes its place. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--step-timeout",
        type=float,
        default=DEFAULT_STEP_TIMEOUT_S,
        metavar="SECONDS",
        help="So is one that works but gives no sign of life for longer, or whose engine takes "
        "longer for a step. Default: %(default)s.",
    )
    try:
        rest, config_path = _take_scheduler_config(list(argv), parser)
        args = parser.parse_args(rest)
    except (AssertionError, ValueError) as error:
        # vLLM's parser tells so of a --config it cannot use, ours of everything.
        raise UsageError(str(error)) from error
    if args.model_tag is not None:
        args.model = args.model_tag
    if args.host is None and not args.uds:
        args.host = "127.0.0.1"
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    _refuse_what_cannot_work(args, parser)
    config = _scheduler_config(args, config_path)
    if args.instances == 0:
        _check_that_it_starts_some(config)
    return args, ServeOptions(
        num_instances=args.instances,
        num_frontends=args.frontends,
        config=config,
        ray_address=args.ray_address,
        any_node=args.any_node,
        gpus_per_instance=args.gpus_per_instance,
        admin_api=has_admin_api(args),
        decision_log=Path(args.decision_log).absolute() if args.decision_log else None,
        heartbeat_timeout_s=args.heartbeat_timeout,
        step_timeout_s=args.step_timeout,
        logs=_logs(args),
        config_file=str(config_path) if config_path is not None else None,
    )


def _logs(args: argparse.Namespace) -> LogOptions:
    """The log options, which from here on vLLM's own loggers have as well."""
    logging_config = getattr(args, "logging_config", None) or LoggingConfig()
    log_format = args.log_format or getattr(logging_config, "formatter", "text")
    logging_config = replace(logging_config, **accepted(LoggingConfig, formatter=log_format))
    args.logging_config = logging_config
    return LogOptions(
        format=log_format,
        level=getattr(args, "log_level", None) or logging_config.log_level,
    )


def _refuse_what_cannot_work(args: argparse.Namespace, parser: ServeParser) -> None:
    refused = take_data_parallel_size(args, parser)
    if refused is not None:
        raise UsageError(refused)
    if args.instances < 0:
        raise UsageError(f"--instances {args.instances}: a number of instances is needed.")
    if args.frontends < 1:
        raise UsageError(f"--frontends {args.frontends}: at least 1 frontend is needed.")
    if args.gpus_per_instance is not None and not args.gpus_per_instance > 0:
        raise UsageError(
            f"--gpus-per-instance {args.gpus_per_instance:g}: give a part of a GPU, such as 0.5."
        )
    for name in ("heartbeat_timeout", "step_timeout"):
        if getattr(args, name) <= 0:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag}: a positive number of seconds is needed.")
    refused = refusal(args, parser)
    if refused is not None:
        raise UsageError(refused)


def _check_that_it_starts_some(config: Config) -> None:
    options = build_bundle(config).options
    if options.min_instances or not options.max_instances:
        raise UsageError(
            "--instances 0: a request has an instance started only if the scheduler may scale from "
            "0. Add --min-instances 0 --max-instances N, or set both in its configuration."
        )


def _take_scheduler_config(argv: list[str], parser: ServeParser) -> tuple[list[str], Path | None]:
    """``argv`` without the ``--config`` whose file is the scheduler's, and that file.

    vLLM's ``--config`` names a file of flags. Ours is told apart by its keys, which are no
    flags of vLLM's.
    """
    found: Path | None = None
    rest: list[str] = []
    position = 0
    while position < len(argv):
        name, equals, value = argv[position].partition("=")
        width = 1 if equals else 2
        if name != "--config" or (not equals and position + 1 == len(argv)):
            rest.append(argv[position])
            position += 1
            continue
        path = Path(value if equals else argv[position + 1])
        document = _read(path)
        if not isinstance(document, dict) or not SCHEDULER_KEYS & document.keys():
            if isinstance(document, dict):
                parser.check_keys(document, path)
            rest += ["--config", str(path)]  # vLLM overlooks --config=FILE
        elif found is not None:
            raise UsageError(f"Two scheduler configurations: {found} and {path}.")
        else:
            found = path
        position += width
    return rest, found


def _read(path: Path) -> Any:
    try:
        return read_yaml(path)
    except YamlFileError as error:
        raise UsageError(f"--config {error}.") from error


def _scheduler_config(args: argparse.Namespace, path: Path | None) -> Config:
    policy: str | None = args.policy
    given = {"min_instances": args.min_instances, "max_instances": args.max_instances}
    limits = {name: number for name, number in given.items() if number is not None}
    if policy is not None and path is not None:
        raise UsageError(f"Give --policy or --config {path}, not both.")
    try:
        config = load(path) if path is not None else Config.default(policy or DEFAULT_POLICY)
        config = replace(config, scheduler={**config.scheduler, **limits})
        build_bundle(config)  # an unknown policy is an error now, not in an actor later
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return config


def has_admin_api(args: argparse.Namespace) -> bool:
    """True if the server is to have the admin API, where it listens."""
    return serves_admin_api(args.admin_api, is_local=is_local(args))


def is_local(args: argparse.Namespace) -> bool:
    """True if nobody but this machine can reach the server."""
    return bool(args.uds) or is_loopback(args.host)
