"""Vidur on one trace, run by the interpreter of an environment that has Vidur; prints JSON.

    python _vidur_driver.py TRACE.csv NUM_REPLICAS NUM_BLOCKS BASE_MS REQUEST_MS KV_TOKEN_MS

TRACE has Vidur's columns. Vidur's own step times come from profiles that it downloads; here they
come from three numbers (milliseconds: of a step, for each request, for each token of context), so
that both simulators are given the same ones and neither pays for its predictor. What is timed is
the loop over Vidur's events, with its metrics off.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABCMeta
from importlib.metadata import version
from typing import Any

DATE = "2026-01-01"


def line_predictor(base_ms: float, request_ms: float, kv_token_ms: float) -> type:
    """A predictor whose steps take a line in requests and tokens of context."""

    from vidur._native.entities import ExecutionTime
    from vidur.execution_time_predictor import BaseExecutionTimePredictor

    def get_execution_time(self: Any, batch: Any, pipeline_stage: int) -> Any:
        step_ms = (
            base_ms + request_ms * len(batch.requests) + kv_token_ms * sum(batch.num_kv_tokens)
        )
        layers = self._num_layers_per_pipeline_stage
        return ExecutionTime(layers, step_ms / layers, *[0.0] * 13)

    predictor = ABCMeta(
        "LinePredictor", (BaseExecutionTimePredictor,), {"get_execution_time": get_execution_time}
    )
    # The other methods are the parts that the one above does not add up.
    predictor.__abstractmethods__ = frozenset()
    return predictor


def main(arguments: list[str]) -> None:
    """Simulate, and say how long it took."""
    from vidur import config as vidur
    from vidur.execution_time_predictor import ExecutionTimePredictorRegistry
    from vidur.simulator import Simulator
    from vidur.types import ExecutionTimePredictorType

    trace, num_replicas, num_blocks, *step_ms = arguments
    kind = ExecutionTimePredictorType.RANDOM_FORREST
    ExecutionTimePredictorRegistry.unregister(kind)
    ExecutionTimePredictorRegistry.register(kind, line_predictor(*map(float, step_ms)))
    config = vidur.SimulationConfig(
        cluster_config=vidur.ClusterConfig(
            num_replicas=int(num_replicas),
            replica_config=vidur.ReplicaConfig(num_pipeline_stages=1, tensor_parallel_size=1),
            cache_config=vidur.CacheConfig(num_blocks=int(num_blocks)),
            global_scheduler_config=vidur.RoundRobinGlobalSchedulerConfig(),
            replica_scheduler_config=vidur.SarathiSchedulerConfig(
                batch_size_cap=256, chunk_size=2048
            ),
        ),
        request_generator_config=vidur.TraceRequestGeneratorConfig(
            trace_file=trace,
            date=DATE,
            prefill_scale_factor=1.0,
            time_scale_factor=1.0,
            max_tokens=16_384,
        ),
        metrics_config=vidur.MetricsConfig(
            write_metrics=False,
            enable_chrome_trace=False,
            store_plots=False,
            store_request_metrics=False,
            store_batch_metrics=False,
            store_utilization_metrics=False,
        ),
    )
    simulator = Simulator(config)
    num_requests = len(simulator._event_queue)
    start, processor_start = time.perf_counter(), time.process_time()
    simulator.run()
    seconds, processor_s = time.perf_counter() - start, time.process_time() - processor_start
    print(
        json.dumps(
            {
                "version": version("vidur"),
                "num_requests": num_requests,
                "seconds": seconds,
                "processor_s": processor_s,
                "makespan_s": simulator._time,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
