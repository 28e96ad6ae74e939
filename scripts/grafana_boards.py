"""Write the Grafana boards of ``configs/grafana/``: what each panel asks, and how it looks.

Boards are JSON of thousands of lines, of which a few hundred words are ours: those are here. The
files are made by ``make docs``; a test resolves every query against the catalogue of metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "configs" / "grafana"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 12, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph: ``queries`` are PromQL by legend."""

    title: str
    queries: Mapping[str, str]
    unit: str = "short"
    about: str = ""


def p50_p99(name: str, by: str = "") -> dict[str, str]:
    """The median and the 99th percentile of a histogram, by a label if one is named."""
    legend = f" {{{{{by}}}}}" if by else ""
    return {f"P{100 * q:g}{legend}": p(q, name, by) for q in (0.5, 0.99)}


def of_instance(gauge: str, label: str = "instance_id") -> dict[str, str]:
    """A gauge of the instance that the board is set to."""
    return {f"{{{{{label}}}}}": f'{gauge}{{instance_id=~"$instance_id"}}'}


def rate_by(label: str, counter: str) -> dict[str, str]:
    """Increase a second of a counter over five minutes, by a label."""
    return {f"{{{{{label}}}}}": f"sum by ({label}) (rate({counter}[5m]))"}


def p(quantile: float, name: str, by: str = "") -> str:
    """A quantile of a histogram over five minutes."""
    labels = f"le, {by}" if by else "le"
    rate = f"rate({name}_bucket[5m])"
    return f"histogram_quantile({quantile}, sum by ({labels}) ({rate}))"


def by_instance(query: str) -> str:
    """A query by vLLM's engine label, with the instance that has the label now."""
    return f"{query} * on (engine) group_left (instance_id) llumsched_instance_info"


OVERVIEW = (
    Panel(
        "Requests that ended",
        {
            "{{outcome}} {{priority_class}}": (
                "sum by (outcome, priority_class) (rate(llumsched_requests_total[5m]))"
            )
        },
        "reqps",
    ),
    Panel(
        "Output tokens",
        {"tokens": "rate(llumsched_output_tokens_total[5m])"},
        about="Of requests that finished.",
    ),
    Panel(
        "Time to first token",
        p50_p99("llumsched_time_to_first_token_seconds", "priority_class"),
        "s",
    ),
    Panel("Held by the scheduler", {"{{priority_class}}": "llumsched_queued_requests"}),
    Panel(
        "KV blocks in use",
        {
            "{{instance_id}}": (
                'sum by (instance_id) (llumsched_instance_blocks{kind="used"})'
                " / sum by (instance_id) (llumsched_instance_blocks)"
            )
        },
        "percentunit",
        "Which instance is hot.",
    ),
    Panel(
        "Imbalance: spread of freeness",
        {"spread": "llumsched_freeness_spread"},
        about="Freeness of the freest serving instance less that of the fullest.",
    ),
    Panel("Instances", {"{{state}}": "llumsched_instances"}),
    Panel(
        "Losses and resumptions",
        {
            "instances lost": "increase(llumsched_lost_instances_total[5m])",
            "requests resumed": "increase(llumsched_resumptions_total[5m])",
            "scheduler started": "increase(llumsched_scheduler_starts_total[5m])",
        },
    ),
    Panel(
        "Decisions of the scheduler, P99",
        {"{{event}}": p(0.99, "llumsched_decision_seconds", "event")},
        "s",
    ),
    Panel("Dispatches by reason", rate_by("reason", "llumsched_dispatches_total"), "reqps"),
)

INSTANCE = (
    Panel("KV blocks", of_instance("llumsched_instance_blocks", "kind")),
    Panel("Requests", of_instance("llumsched_instance_requests", "status")),
    Panel("Freeness", of_instance("llumsched_instance_freeness")),
    Panel("Engine step", of_instance("llumsched_instance_step_seconds"), "s"),
    Panel("Migrations under way", of_instance("llumsched_instance_migrations", "direction")),
    Panel(
        "Preemptions (vLLM)",
        {"{{instance_id}}": by_instance("sum by (engine) (rate(vllm:num_preemptions_total[5m]))")},
    ),
    Panel(
        "Time to first token at the engine (vLLM), P99",
        {"{{instance_id}}": by_instance(p(0.99, "vllm:time_to_first_token_seconds", "engine"))},
        "s",
    ),
    Panel("Age of the load report", of_instance("llumsched_instance_report_age_seconds"), "s"),
)

MIGRATIONS = (
    Panel("Migrations that ended", rate_by("outcome", "llumsched_migrations_total"), "ops"),
    Panel(
        "Why nothing moved",
        {
            "{{cause}} ({{phase}})": (
                'sum by (cause, phase) (rate(llumsched_migrations_total{cause!=""}[5m]))'
            )
        },
        "ops",
    ),
    Panel("Ordered, by reason", rate_by("reason", "llumsched_migrations_started_total"), "ops"),
    Panel(
        "Suspension",
        p50_p99("llumsched_migration_suspended_seconds"),
        "s",
        "A client's pause is that and one step.",
    ),
    Panel(
        "Pause of a client",
        p50_p99("llumsched_client_pause_seconds", "cause"),
        "s",
        "Between two tokens of a request whose instance changed.",
    ),
    Panel("Duration", p50_p99("llumsched_migration_seconds"), "s"),
    Panel("Bytes copied", {"bytes": "rate(llumsched_migration_bytes_sum[5m])"}, "Bps"),
    Panel(
        "Blocks and stages, mean",
        {
            what: f"rate(llumsched_migration_{what}_sum[5m])"
            f" / rate(llumsched_migration_{what}_count[5m])"
            for what in ("blocks", "stages")
        },
    ),
    Panel(
        "Expected and won, mean",
        {
            "expected": (
                "rate(llumsched_migration_expected_seconds_sum[5m])"
                " / rate(llumsched_migration_expected_seconds_count[5m])"
            ),
            "won": (
                "rate(llumsched_migration_won_seconds_sum[5m])"
                " / rate(llumsched_migration_won_seconds_count[5m])"
            ),
        },
        unit="s",
        about="Won: how long its source would have had no room for the request.",
    ),
    Panel(
        "Fragmentation",
        {"blocks": "llumsched_fragmented_blocks"},
        about="Free blocks of other instances that the first requests in line could use.",
    ),
)

_WITHIN = tuple(
    Panel(
        f"First token within {seconds:g} s",
        {
            "{{priority_class}}": (
                "sum by (priority_class)"
                f' (rate(llumsched_time_to_first_token_seconds_bucket{{le="{seconds}"}}[5m]))'
                " / sum by (priority_class)"
                " (rate(llumsched_time_to_first_token_seconds_count[5m]))"
            )
        },
        "percentunit",
    )
    for seconds in (0.25, 0.5, 1.0, 2.5)
)
SLO = (
    *_WITHIN,
    Panel(
        "Placement, P99",
        {"P99 {{priority_class}}": p(0.99, "llumsched_placement_seconds", "priority_class")},
        "s",
        "Waiting at the scheduler included.",
    ),
    Panel("Turned away", rate_by("cause", "llumsched_rejections_total"), "reqps"),
)

BOARDS: Mapping[str, tuple[str, Sequence[Panel]]] = {
    "overview": ("llumsched: overview", OVERVIEW),
    "instance": ("llumsched: one instance", INSTANCE),
    "migrations": ("llumsched: migrations", MIGRATIONS),
    "slo": ("llumsched: SLO by class", SLO),
}


def board(name: str) -> dict[str, Any]:
    """One board as Grafana imports it."""
    title, panels = BOARDS[name]
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    ]
    if name == "instance":
        variables.append(
            {
                "name": "instance_id",
                "type": "query",
                "datasource": SOURCE,
                "query": "label_values(llumsched_instance_info, instance_id)",
                "refresh": 2,
                "label": "Instance",
            }
        )
    return {
        "uid": f"llumsched-{name}",
        "title": title,
        "tags": ["llumsched"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": list(_panels(panels)),
    }


def _panels(panels: Sequence[Panel]) -> Iterator[dict[str, Any]]:
    for number, panel in enumerate(panels):
        yield {
            "id": number + 1,
            "type": "timeseries",
            "title": panel.title,
            "description": panel.about,
            "datasource": SOURCE,
            "gridPos": {
                "x": WIDTH * (number % 2),
                "y": HEIGHT * (number // 2),
                "w": WIDTH,
                "h": HEIGHT,
            },
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
            "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
            "targets": [
                {"refId": chr(65 + i), "expr": query, "legendFormat": legend, "datasource": SOURCE}
                for i, (legend, query) in enumerate(panel.queries.items())
            ],
        }


def written(name: str) -> str:
    """The file of a board."""
    return json.dumps(board(name), indent=2) + "\n"


def main() -> None:
    """Write every board."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in BOARDS:
        (FOLDER / f"{name}.json").write_text(written(name), encoding="utf-8")


if __name__ == "__main__":
    main()
