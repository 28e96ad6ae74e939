"""The catalogue of the metrics that are added to vLLM's, by the process that counts them.

Invariants: no label is called ``instance`` or ``job``, which Prometheus gives to every target; no
value is infinite; a counter whose label values are known is there, at 0, from the start. The table
of metrics in the docs, the boards and the alert rules are checked against this list. This module
counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from llumsched.core.types import PriorityClass

Labels = tuple[str, ...]
Metric = TypeVar("Metric", Counter, Gauge, Histogram)

CLASSES: tuple[Labels, ...] = tuple((kind.name.lower(),) for kind in PriorityClass)
# Seconds; from a token of a small model to the wait of a long prompt behind others.
LATENCY_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
PLACEMENT_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 1.0, 10.0, 60.0)
DECISION_BUCKETS = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005, 0.01, 0.1, 1.0),
)
PAUSE_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1),
    *(0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
RUN_BUCKETS = (0.1, 1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0)
BYTES_BUCKETS = tuple(float(1 << power) for power in range(16, 37, 2))
BLOCKS_BUCKETS = tuple(float(1 << power) for power in range(14))
STAGES_BUCKETS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


class Where(StrEnum):
    """The process that counts: each frontend, the scheduler, or a frontend for the scheduler; the
    proxy before plain servers; each process that does batches."""

    FRONTEND = "frontend"
    SCHEDULER = "scheduler"
    POOL = "pool"
    PROXY = "proxy"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. ``name`` has no ``_total``; ``known`` are label values that exist from the
    start, each with a value for every label."""

    where: Where
    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()
    known: tuple[Labels, ...] = ()

    @property
    def exposed_name(self) -> str:
        """The name in queries; a histogram has ``_bucket``, ``_sum`` and ``_count`` of it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def counter(self, registry: CollectorRegistry) -> Counter:
        """The counter, with its known label values at 0."""
        return self._with_known(Counter(self.name, self.help, self.labels, registry=registry))

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """The histogram, with its known label values empty."""
        return self._with_known(
            Histogram(self.name, self.help, self.labels, buckets=self.buckets, registry=registry)
        )

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        """The gauge, with its known label values at 0."""
        return self._with_known(Gauge(self.name, self.help, self.labels, registry=registry))

    def _with_known(self, metric: Metric) -> Metric:
        for values in self.known:
            metric.labels(*values)
        return metric

    def gauge_family(self) -> GaugeMetricFamily:
        """A family for a collector of gauges."""
        return GaugeMetricFamily(self.name, self.help, labels=self.labels)

    def counter_family(self) -> CounterMetricFamily:
        """A family for a collector of counters."""
        return CounterMetricFamily(self.name, self.help, labels=self.labels)


_frontend_counter = partial(MetricSpec, Where.FRONTEND, "counter")
_frontend_histogram = partial(MetricSpec, Where.FRONTEND, "histogram")
_pool_gauge = partial(MetricSpec, Where.POOL, "gauge")
_proxy_counter = partial(MetricSpec, Where.PROXY, "counter")
_proxy_gauge = partial(MetricSpec, Where.PROXY, "gauge")
_batch_counter = partial(MetricSpec, Where.BATCH, "counter")
_batch_gauge = partial(MetricSpec, Where.BATCH, "gauge")
_batch_histogram = partial(MetricSpec, Where.BATCH, "histogram")
_scheduler_counter = partial(MetricSpec, Where.SCHEDULER, "counter")
_scheduler_histogram = partial(MetricSpec, Where.SCHEDULER, "histogram")

# ---- counted in each frontend, where the client's view is ---------------------------------------

REQUESTS = _frontend_counter(
    "llumsched_requests",
    "Requests that ended, by priority class and outcome.",
    labels=("priority_class", "outcome"),
    known=tuple(
        (name, outcome)
        for (name,) in CLASSES
        for outcome in ("finished", "aborted", "rejected", "instance_lost")
    ),
)
TIME_TO_FIRST_TOKEN = _frontend_histogram(
    "llumsched_time_to_first_token_seconds",
    "From a request's arrival at the frontend to its first token.",
    labels=("priority_class",),
    buckets=LATENCY_BUCKETS,
    known=CLASSES,
)
PLACEMENT = _frontend_histogram(
    "llumsched_placement_seconds",
    "How long the global scheduler took to choose an instance, waiting included.",
    labels=("priority_class",),
    known=CLASSES,
    buckets=PLACEMENT_BUCKETS,
)
CLIENT_PAUSE = _frontend_histogram(
    "llumsched_client_pause_seconds",
    (
        "Between the last token of one instance and the first of the next, as a client sees it:"
        " because the request moved, or because its instance was lost."
    ),
    labels=("cause",),
    buckets=PAUSE_BUCKETS,
    known=(("migration",), ("resumption",)),
)
MOVES = _frontend_counter(
    "llumsched_moves", "Times that a request's outputs began to come from another instance."
)
LOST_INSTANCES = _frontend_counter(
    "llumsched_lost_instances", "Instances that ended while the server ran, without being told to."
)
RESUMPTIONS = _frontend_counter(
    "llumsched_resumptions",
    "Times that a request was resumed at another instance because its own was gone.",
)

# ---- counted in the scheduler's process; go on where they were when it is started again ---------

DECISION = _scheduler_histogram(
    "llumsched_decision_seconds",
    "How long the scheduler took to handle an event and decide what follows, by event.",
    labels=("event",),
    buckets=DECISION_BUCKETS,
    known=(("RequestArrived",), ("LoadReported",), ("Ticked",)),
)
DISPATCHES = _scheduler_counter(
    "llumsched_dispatches",
    "Requests sent to an instance, by bundle and by the policy's reason, numbers left out.",
    labels=("policy", "reason"),
)
REJECTIONS = _scheduler_counter(
    "llumsched_rejections",
    "Requests that the scheduler turned away, by cause.",
    labels=("cause",),
    known=(("overloaded",), ("client_limit",), ("too_long",)),
)
MIGRATIONS_STARTED = _scheduler_counter(
    "llumsched_migrations_started",
    "Migrations that were ordered, by reason, numbers left out.",
    labels=("reason",),
)
MIGRATIONS = _scheduler_counter(
    "llumsched_migrations",
    (
        "Migrations that ended, by outcome, by the phase they had reached, and by the cause of"
        " those that moved nothing."
    ),
    labels=("outcome", "phase", "cause"),
    known=(
        ("committed", "committing", ""),
        ("aborted", "copying", "request_finished"),
        ("refused", "reserving", "reservation_rejected"),
        ("nothing_to_move", "choosing", ""),
    ),
)
MIGRATION_SECONDS = _scheduler_histogram(
    "llumsched_migration_seconds",
    "Of committed migrations: from the order's arrival at the source to the commit.",
    buckets=LATENCY_BUCKETS,
)
MIGRATION_PAUSE = _scheduler_histogram(
    "llumsched_migration_suspended_seconds",
    (
        "Of committed migrations: from the last step at the source to the next token at the"
        " destination: the client's pause, of which at most a second of that step is counted."
    ),
    buckets=PAUSE_BUCKETS,
)
MIGRATION_BYTES = _scheduler_histogram(
    "llumsched_migration_bytes",
    "Of committed migrations: bytes of KV cache that were copied.",
    buckets=BYTES_BUCKETS,
)
MIGRATION_BLOCKS = _scheduler_histogram(
    "llumsched_migration_blocks",
    "Of committed migrations: KV blocks that were copied.",
    buckets=BLOCKS_BUCKETS,
)
SESSION_MOVES = _scheduler_counter(
    "llumsched_session_moves",
    "Moves of the KV of an idle session, by outcome and by the cause of those that moved nothing.",
    labels=("outcome", "cause"),
    known=(("committed", ""),),
)
SESSION_MOVED_BYTES = _scheduler_counter(
    "llumsched_session_moved_bytes", "Bytes of KV cache that were copied for idle sessions."
)
SESSION_MOVED_TOKENS = _scheduler_counter(
    "llumsched_session_moved_tokens",
    "Tokens of idle sessions that another instance has in its prefix cache after a move.",
)
MIGRATION_STAGES = _scheduler_histogram(
    "llumsched_migration_stages",
    "Of committed migrations: stages in which the blocks were copied.",
    buckets=STAGES_BUCKETS,
)
MIGRATION_WON = _scheduler_histogram(
    "llumsched_migration_won_seconds",
    (
        "Of committed migrations with KV blocks: how long the source would have had no room for the"
        " request, had it stayed; counted when it has ended or moved again."
    ),
    buckets=LATENCY_BUCKETS,
)
MIGRATION_EXPECTED = _scheduler_histogram(
    "llumsched_migration_expected_seconds",
    "Of the same migrations: waiting that the policy expected them to save, where it says so.",
    buckets=LATENCY_BUCKETS,
)
POLICY_FAILURES = _scheduler_counter(
    "llumsched_policy_failures",
    "Decisions in which a policy raised or answered nonsense, by policy; of the proxy as well.",
    labels=("policy",),
)
SCALING_ACTIONS = _scheduler_counter(
    "llumsched_scaling_actions",
    "Instances launched, not come, drained and told to leave.",
    labels=("action",),
    known=(("launch",), ("launch_failed",), ("drain",), ("terminate",)),
)
SCHEDULER_STARTS = _scheduler_counter(
    "llumsched_scheduler_starts",
    "Times that the scheduler was started: 1, and 1 more for each time in another's place.",
)
FINISHED_REQUESTS = _scheduler_counter(
    "llumsched_finished_requests",
    "Requests that finished by themselves, as the scheduler was told.",
)
OUTPUT_TOKENS = _scheduler_counter(
    "llumsched_output_tokens", "Output tokens of requests that finished."
)

# ---- told by a frontend, as the scheduler described the pool a moment ago -----------------------

SCHEDULER_UP = _pool_gauge(
    "llumsched_scheduler_up",
    "1 while the global scheduler answers; without it the rest of these is left out.",
)
BUILD_INFO = _pool_gauge(
    "llumsched_build_info",
    "1, with the versions that run and the policy bundle in force.",
    labels=("version", "vllm_version", "python_version", "policy"),
)
UNPROVEN_CONNECTIONS = _pool_gauge(
    "llumsched_unproven_connections",
    "Connections to a process, since its start, that did not hold the pool's keys.",
    labels=("process",),
)
QUEUED_REQUESTS = _pool_gauge(
    "llumsched_queued_requests",
    "Requests that the scheduler holds, by priority class.",
    labels=("priority_class",),
    known=CLASSES,
)
INSTANCES = _pool_gauge(
    "llumsched_instances",
    "Instances, by state.",
    labels=("state",),
    known=(("serving",), ("draining",)),
)
INSTANCE_INFO = _pool_gauge(
    "llumsched_instance_info",
    "1: the engine label that an instance has in vLLM's metrics, its role and state.",
    labels=("instance_id", "engine", "role", "state", "policy"),
)
INSTANCE_FREENESS = _pool_gauge(
    "llumsched_instance_freeness",
    (
        "Free KV blocks for each running request, all of its blocks on an idle instance; none is"
        " told of one that drains."
    ),
    labels=("instance_id",),
)
INSTANCE_BLOCKS = _pool_gauge(
    "llumsched_instance_blocks",
    "KV blocks: free, reserved for arriving requests, used by its own.",
    labels=("instance_id", "kind"),
)
INSTANCE_REQUESTS = _pool_gauge(
    "llumsched_instance_requests",
    "Requests on it that run and that wait.",
    labels=("instance_id", "status"),
)
INSTANCE_CAN_MIGRATE = _pool_gauge(
    "llumsched_instance_can_migrate",
    (
        "1 if requests can leave and reach it, else 0: `llumsched status` says why, and so does"
        " the log when the instance joins."
    ),
    labels=("instance_id",),
)
INSTANCE_MIGRATIONS = _pool_gauge(
    "llumsched_instance_migrations",
    "Migrations under way, into it and out of it.",
    labels=("instance_id", "direction"),
)
INSTANCE_STEP = _pool_gauge(
    "llumsched_instance_step_seconds", "Recent time of one engine step.", labels=("instance_id",)
)
INSTANCE_REPORT_AGE = _pool_gauge(
    "llumsched_instance_report_age_seconds", "Since its last load report.", labels=("instance_id",)
)
FREENESS_SPREAD = _pool_gauge(
    "llumsched_freeness_spread",
    "Imbalance: the freeness of the freest serving instance less that of the fullest.",
)
FRAGMENTED_BLOCKS = _pool_gauge(
    "llumsched_fragmented_blocks",
    (
        "Fragmentation: free KV blocks of other instances that requests which head their"
        " instance's queue could use."
    ),
)

# ---- of the proxy before plain servers ----------------------------------------------------------

PROXY_FIRST_BYTE = MetricSpec(
    Where.PROXY,
    "histogram",
    "llumsched_proxy_time_to_first_byte_seconds",
    "From a request's arrival to the first byte of its answer.",
    labels=("server",),
    buckets=LATENCY_BUCKETS,
)
PROXY_FAILURES = _proxy_counter(
    "llumsched_proxy_failures",
    "Requests that a server failed, before or after the first byte of the answer.",
    labels=("server", "when"),
)
PROXY_REJECTIONS = _proxy_counter(
    "llumsched_proxy_rejections", "Requests that the scheduler turned away."
)
PROXY_CONTINUATIONS = _proxy_counter(
    "llumsched_proxy_continuations",
    "Streams of another server, lost in the middle, that this one brought to their end.",
    labels=("server",),
)
PROXY_SERVER_UP = _proxy_gauge(
    "llumsched_proxy_server_up", "1 while requests are sent to it.", labels=("server",)
)
PROXY_SERVER_REQUESTS = _proxy_gauge(
    "llumsched_proxy_server_requests",
    "Requests sent to a server that have no whole answer yet.",
    labels=("server",),
)

# ---- of batches and jobs: states are those of the database, the rest a process counts ------------

BATCH_FILES = _batch_gauge(
    "llumsched_batch_files",
    "Files in the database, by purpose; two of each batch are made of its outcomes.",
    labels=("purpose",),
    known=(("batch",), ("batch_output",), ("batch_error",)),
)
BATCHES = _batch_gauge(
    "llumsched_batches",
    "Batches in the database, by state.",
    labels=("state",),
    known=tuple(
        (state,)
        for state in ("in_progress", "cancelling", "completed", "cancelled", "expired", "failed")
    ),
)
BATCH_OPEN_LINES = _batch_gauge(
    "llumsched_batch_open_lines",
    "Lines of open batches without an outcome, by what they wait for.",
    labels=("state",),
    known=(("not_begun",), ("in_flight",), ("to_be_tried_again",)),
)
BATCH_LATE = _batch_gauge(
    "llumsched_batch_late", "1 if a batch will miss its deadline at the present rate."
)
BATCH_WORKERS = _batch_gauge(
    "llumsched_batch_workers", "Processes that share the database and renew their lease."
)
BATCH_UPLOADS = _batch_counter(
    "llumsched_batch_uploads",
    "Uploads, by outcome; one that breaks off is refused.",
    labels=("outcome",),
    known=(("accepted",), ("refused",)),
)
BATCH_LINES = _batch_counter(
    "llumsched_batch_lines",
    "Lines that this process gave an outcome.",
    labels=("outcome",),
    known=(("succeeded",), ("failed",)),
)
BATCH_RETRIES = _batch_counter(
    "llumsched_batch_retries",
    "Lines that are to be sent again: they failed, or were given back without a fault of theirs.",
    labels=("cause",),
    known=(("failed",), ("given_back",)),
)
BATCH_LOST_LINES = _batch_counter(
    "llumsched_batch_lost_lines",
    "Lines that this process took from another whose lease was over, to be sent again.",
)
BATCH_TRY_SECONDS = _batch_histogram(
    "llumsched_batch_try_seconds",
    "From sending a line to its answer, or to the failure of this try.",
    buckets=LATENCY_BUCKETS,
)
JOB_RUNS = _batch_gauge(
    "llumsched_job_runs",
    "Runs of jobs in the history, of 90 days, by state.",
    labels=("job_name", "state"),
)
JOB_RUN_SECONDS = _batch_histogram(
    "llumsched_job_run_seconds",
    "Tries of runs that ended in this process: succeeded, failed, or to be tried again.",
    labels=("job_name", "outcome"),
    buckets=RUN_BUCKETS,
)
JOB_MISFIRES = _batch_counter(
    "llumsched_job_misfires",
    "Times of a job that passed while nobody looked, whether made up for or not.",
    labels=("job_name",),
)
JOB_LOST_RUNS = _batch_counter(
    "llumsched_job_lost_runs",
    "Runs that this process took from another whose lease was over, to be begun again.",
)

CATALOGUE: tuple[MetricSpec, ...] = tuple(
    value for value in tuple(globals().values()) if isinstance(value, MetricSpec)
)
