"""Names of what OpenAI servers say of themselves at `/metrics`, an entry an engine.

Adding an engine is one entry of `ENGINES`. The load of a server without any of these names, or
without the page, is what the proxy itself has sent to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Samples = Mapping[str, list[tuple[Mapping[str, str], float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """Names of one engine's gauges; `None` where it has none of the kind."""

    engine: str
    num_running: str
    num_waiting: str
    cache_usage: str | None
    """Share of the KV cache in use, from 0 to 1."""
    num_cache_tokens: str | None = None
    """Size of the KV cache, in tokens."""
    cache_info: str | None = None
    """An info metric with labels `block_size` and `num_gpu_blocks`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is read."""
        names = (
            self.num_running,
            self.num_waiting,
            self.cache_usage,
            self.num_cache_tokens,
            self.cache_info,
        )
        return tuple(name for name in names if name is not None)


ENGINES = (
    EngineMetrics(
        engine="vLLM",
        num_running="vllm:num_requests_running",
        num_waiting="vllm:num_requests_waiting",
        cache_usage="vllm:kv_cache_usage_perc",
        cache_info="vllm:cache_config_info",
    ),
    EngineMetrics(
        engine="SGLang",
        num_running="sglang:num_running_reqs",
        num_waiting="sglang:num_queue_reqs",
        cache_usage="sglang:token_usage",
        num_cache_tokens="sglang:max_total_num_tokens",
    ),
    EngineMetrics(
        engine="LMDeploy",
        num_running="lmdeploy:num_requests_running",
        num_waiting="lmdeploy:num_requests_waiting",
        cache_usage="lmdeploy:gpu_cache_usage_perc",
    ),
    EngineMetrics(
        engine="TGI",
        num_running="tgi_batch_current_size",
        num_waiting="tgi_queue_size",
        cache_usage=None,
    ),
    EngineMetrics(
        engine="TensorRT-LLM",
        num_running="trtllm_num_requests_running",
        num_waiting="trtllm_num_requests_waiting",
        cache_usage="trtllm_kv_cache_utilization",
    ),
    EngineMetrics(
        engine="llama.cpp",
        num_running="llamacpp:requests_processing",
        num_waiting="llamacpp:requests_deferred",
        # Builds before August 2025 have it.
        cache_usage="llamacpp:kv_cache_usage_ratio",
    ),
)

_NAMES = tuple({name for engine in ENGINES for name in engine.names})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """One reading of a server's metrics. `None` is what it does not say."""

    engine: str
    num_running: int
    num_waiting: int
    cache_usage: float | None = None
    num_cache_tokens: int | None = None


def read_load(page: str) -> ServerLoad | None:
    """The load that a page of metrics tells; `None` where no engine is recognised.

    Ranks of one server (data parallelism) count together; their cache usage is the mean.
    """
    samples = _samples(page)
    for names in ENGINES:
        if names.num_running not in samples:
            continue
        usage = _values(samples, names.cache_usage)
        return ServerLoad(
            engine=names.engine,
            num_running=round(sum(_values(samples, names.num_running))),
            num_waiting=round(sum(_values(samples, names.num_waiting))),
            cache_usage=min(1.0, max(0.0, sum(usage) / len(usage))) if usage else None,
            num_cache_tokens=_num_cache_tokens(samples, names),
        )
    return None


def _num_cache_tokens(samples: Samples, names: EngineMetrics) -> int | None:
    tokens = round(sum(_values(samples, names.num_cache_tokens)))
    for labels, _ in samples.get(names.cache_info or "", ()):
        try:
            tokens += int(labels["block_size"]) * int(labels["num_gpu_blocks"])
        except (KeyError, ValueError):
            continue
    return tokens or None


def _values(samples: Samples, name: str | None) -> list[float]:
    return [value for _, value in samples.get(name or "", ())]


def _samples(page: str) -> Samples:
    """Samples by name, of the names that are known; pages of engines are mostly histograms."""
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families("\n".join(_known_lines(page)) + "\n"):
        for sample in family.samples:
            if sample.value == sample.value:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def _known_lines(page: str) -> Iterable[str]:
    return (line for line in page.splitlines() if line.startswith(_NAMES))
