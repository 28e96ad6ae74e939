"""A scenario: traffic, cluster and policy in plain words, from which a simulation is made.

The fields are the options of `llumsched simulate` and the axes of `llumsched sweep`; each carries
its own help, so that there is one place for names, defaults and limits. A seed makes a scenario
into one run: it draws whatever the traffic draws, and seeds the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import cast

from llumsched import plugins
from llumsched.config import Config, build_bundle, load
from llumsched.core.params import ParamError, check_params, param
from llumsched.simulator.hardware.spec import load_hardware
from llumsched.simulator.labels import is_file
from llumsched.simulator.options import ENGINES, EngineName, SimulationError, SimulationOptions
from llumsched.simulator.traces.generators import GENERATORS, GeneratorOptions, generate
from llumsched.simulator.traces.loaders import FORMATS, load_trace
from llumsched.simulator.traces.trace import Trace, TraceError

EXAMPLE = "example"
"""The traffic that ships: a small trace of chats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Choice of what to simulate. `traffic` is a file, a generator, or `example`."""

    traffic: str
    policy: str = param("adaptive", "a bundle, a dispatch policy, or a YAML configuration")
    # Traffic
    format: str | None = param(None, f"of the file; default: recognised. {', '.join(FORMATS)}")
    columns: str | None = param(
        None, "of another CSV file: arrival=COLUMN,prompt=COLUMN,output=COLUMN"
    )
    rate_rps: float | None = param(
        None, "requests a second: scales time, or draws arrivals where there are none", above=0
    )
    cv: float = param(1.0, "burstiness of drawn arrivals (CV of the gaps); 1: Poisson", above=0)
    resample: bool = param(
        False, "draw a recorded trace's gaps anew with each seed above 0, in blocks"
    )
    requests: int | None = param(
        None, "how many, the first ones; default: all of a file, or 10,000", at_least=1
    )
    clients: int = param(50, "clients of the generator 'clients'", at_least=1)
    length_scale: float = param(1.0, "factor for prompt and output lengths", above=0)
    high_share: float = param(0.0, "share of requests of high priority", at_least=0, at_most=1)
    hash_block_size: int | None = param(
        None, "tokens a prefix hash stands for; default: found from the file", at_least=1
    )
    # Cluster
    instances: int = param(4, "instances at the start", at_least=1)
    hardware: str = param("a10-llama-7b", "name in configs/hardware, or a YAML file")
    engine: str = param("vllm-v1", "which engine is modelled", choices=ENGINES)
    max_num_seqs: int = param(256, "requests in a batch", at_least=1)
    max_num_batched_tokens: int | None = param(
        None, "tokens in a step; default: 2,048 for vllm-v1, 12,000 for vllm-0.1", at_least=1
    )
    num_kv_blocks: int | None = param(
        None, "KV blocks of an instance; default: the hardware's", at_least=1
    )
    max_model_len: int | None = param(
        None, "longest prompt and output together; default: the KV cache", at_least=1
    )
    no_prefix_caching: bool = param(False, "switch the engine's prefix cache off")
    report_interval_s: float = param(0.1, "between load reports of an instance", above=0)
    report_delay_s: float = param(0.001, "from a report to the scheduler", at_least=0)
    boot_s: float | None = param(
        None, "from launch to serving; default: the hardware's", at_least=0
    )
    fail: str | None = param(None, "instances that die, as INSTANCE@SECONDS,...: 0@60,2@90")
    until_s: float | None = param(None, "stop at this time; default: when all is done", above=0)

    def trace(self, seed: int) -> Trace:
        """The traffic, drawn with this seed where it is drawn.

        Raises:
            TraceError: there is no such traffic, or it cannot be read.
        """
        try:
            check_params(self)
        except ParamError as error:
            raise TraceError(str(error)) from error
        trace = self._traffic(seed)
        if self.requests is not None:
            trace = trace.head(self.requests)
        if self.resample and seed:
            trace = trace.resampled(seed)
        trace = trace.scaled(length=self.length_scale)
        if self.high_share > 0:
            trace = trace.with_priorities(self.high_share, seed=seed)
        return trace

    def config(self) -> Config:
        """The policy's configuration, checked.

        Raises:
            ConfigError, PluginError, ParamError: there is no such policy, or it cannot be built.
        """
        config = load(self.policy) if is_file(self.policy) else Config.default(self.policy)
        build_bundle(config)
        return config

    def options(
        self, seed: int, *, record_timeline: bool = False, decision_log: Path | None = None
    ) -> SimulationOptions:
        """The cluster to simulate.

        Raises:
            ConfigError, PluginError, ParamError, HardwareError, SimulationError: an option is
                wrong.
        """
        config = self.config()
        return SimulationOptions(
            hardware=load_hardware(self.hardware),
            num_instances=self.instances,
            engine=cast(EngineName, self.engine),
            config=config,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            num_kv_blocks=self.num_kv_blocks,
            max_model_len=self.max_model_len,
            enable_prefix_caching=not self.no_prefix_caching,
            report_interval_s=self.report_interval_s,
            report_delay_s=self.report_delay_s,
            boot_s=self.boot_s,
            failures=_failures(self.fail),
            seed=config.seed + seed,
            until_s=self.until_s,
            record_timeline=record_timeline,
            decision_log=decision_log,
        )

    def _traffic(self, seed: int) -> Trace:
        if self.traffic in GENERATORS and not Path(self.traffic).exists():
            defaults = GeneratorOptions()
            options = GeneratorOptions(
                rate_rps=defaults.rate_rps if self.rate_rps is None else self.rate_rps,
                cv=self.cv,
                num_requests=defaults.num_requests if self.requests is None else self.requests,
                num_clients=self.clients,
                seed=seed,
            )
            if self.resample:
                raise TraceError(
                    f"resample is for recorded traces: {self.traffic!r} is drawn with the seed"
                )
            return generate(self.traffic, options)
        if self.traffic == EXAMPLE:
            with as_file(files("llumsched.simulator") / "data" / "example.csv") as path:
                return replace(self._load(path, seed), name=EXAMPLE)
        path = Path(self.traffic)
        if not path.exists() and not path.suffix:
            known = dict.fromkeys((*GENERATORS, EXAMPLE))
            said = plugins.unknown_name("traffic", self.traffic, known)
            raise TraceError(f"{said} (and there is no such file)")
        return self._load(path, seed)

    def _load(self, path: Path, seed: int) -> Trace:
        return load_trace(
            path,
            format=self.format,
            columns=self.columns,
            rate_rps=self.rate_rps,
            cv=self.cv,
            seed=seed,
            max_requests=self.requests,
            hash_block_size=self.hash_block_size,
        )


def _failures(text: str | None) -> tuple[tuple[int, float], ...]:
    try:
        pairs = [pair.split("@") for pair in (text or "").split(",") if pair]
        return tuple((int(instance), float(time_s)) for instance, time_s in pairs)
    except ValueError:
        raise SimulationError(
            f"fail={text!r} must be INSTANCE@SECONDS, with commas between: 0@60,2@90"
        ) from None
