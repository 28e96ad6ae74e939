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


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One graph: ``queries`` are PromQL by legend."""

    title: str
    queries: Mapping[str, str]
    unit: str = "short"
    about: str = ""


def p(quantile: float, name: str, by: str = "", where: str = "") -> str:
    """A quantile of a histogram over five minutes."""
    labels = f"le, {by}" if by else "le"
    rate = f"rate({name}_bucket{where}[5m])"
    return f"histogram_quantile({quantile}, sum by ({labels}) ({rate}))"


def by_instance(query: str) -> str:
    """A query by vLLM's engine label, with the instance that has the label now."""
    return f"{query} * on (engine) group_left (instance_id) llumsched_instance_info"


OVERVIEW = (
    Panel(
        title="Requests that ended",
        queries={
            "{{outcome}} {{priority_class}}": (
                "sum by (outcome, priority_class) (rate(llumsched_requests_total[5m]))"
            )
        },
        unit="reqps",
    ),
    Panel(
        title="Output tokens",
        queries={"tokens": "rate(llumsched_output_tokens_total[5m])"},
        unit="short",
        about="Of requests that finished.",
    ),
    Panel(
        title="Time to first token",
        queries={
            "P50 {{priority_class}}": p(
                0.5, "llumsched_time_to_first_token_seconds", "priority_class"
            ),
            "P99 {{priority_class}}": p(
                0.99, "llumsched_time_to_first_token_seconds", "priority_class"
            ),
        },
        unit="s",
    ),
    Panel(
        title="Held by the scheduler",
        queries={"{{priority_class}}": "llumsched_queued_requests"},
    ),
    Panel(
        title="KV blocks in use",
        queries={
            "{{instance_id}}": (
                'sum by (instance_id) (llumsched_instance_blocks{kind="used"})'
                " / sum by (instance_id) (llumsched_instance_blocks)"
            )
        },
        unit="percentunit",
        about="Which instance is hot.",
    ),
    Panel(
        title="Imbalance: spread of freeness",
        queries={"spread": "llumsched_freeness_spread"},
        about="Freeness of the freest serving instance less that of the fullest.",
    ),
    Panel(
        title="Instances",
        queries={"{{state}}": "llumsched_instances"},
    ),
    Panel(
        title="Losses and resumptions",
        queries={
            "instances lost": "increase(llumsched_lost_instances_total[5m])",
            "requests resumed": "increase(llumsched_resumptions_total[5m])",
            "scheduler started": "increase(llumsched_scheduler_starts_total[5m])",
        },
    ),
    Panel(
        title="Decisions of the scheduler, P99",
        queries={"{{event}}": p(0.99, "llumsched_decision_seconds", "event")},
        unit="s",
    ),
    Panel(
        title="Dispatches by reason",
        queries={"{{reason}}": "sum by (reason) (rate(llumsched_dispatches_total[5m]))"},
        unit="reqps",
    ),
)

INSTANCE = (
    Panel(
        title="KV blocks",
        queries={"{{kind}}": 'llumsched_instance_blocks{instance_id=~"$instance_id"}'},
    ),
    Panel(
        title="Requests",
        queries={"{{status}}": 'llumsched_instance_requests{instance_id=~"$instance_id"}'},
    ),
    Panel(
        title="Freeness",
        queries={"{{instance_id}}": 'llumsched_instance_freeness{instance_id=~"$instance_id"}'},
    ),
    Panel(
        title="Engine step",
        queries={"{{instance_id}}": 'llumsched_instance_step_seconds{instance_id=~"$instance_id"}'},
        unit="s",
    ),
    Panel(
        title="Migrations under way",
        queries={"{{direction}}": 'llumsched_instance_migrations{instance_id=~"$instance_id"}'},
    ),
    Panel(
        title="Preemptions (vLLM)",
        queries={
            "{{instance_id}}": by_instance("sum by (engine) (rate(vllm:num_preemptions_total[5m]))")
        },
    ),
    Panel(
        title="Time to first token at the engine (vLLM), P99",
        queries={
            "{{instance_id}}": by_instance(p(0.99, "vllm:time_to_first_token_seconds", "engine"))
        },
        unit="s",
    ),
    Panel(
        title="Age of the load report",
        queries={
            "{{instance_id}}": (
                'llumsched_instance_report_age_seconds{instance_id=~"$instance_id"}'
            )
        },
        unit="s",
    ),
)

MIGRATIONS = (
    Panel(
        title="Migrations that ended",
        queries={"{{outcome}}": "sum by (outcome) (rate(llumsched_migrations_total[5m]))"},
        unit="ops",
    ),
    Panel(
        title="Why nothing moved",
        queries={
            "{{cause}} ({{phase}})": (
                'sum by (cause, phase) (rate(llumsched_migrations_total{cause!=""}[5m]))'
            )
        },
        unit="ops",
    ),
    Panel(
        title="Ordered, by reason",
        queries={"{{reason}}": "sum by (reason) (rate(llumsched_migrations_started_total[5m]))"},
        unit="ops",
    ),
    Panel(
        title="Suspension",
        queries={
            "P50": p(0.5, "llumsched_migration_suspended_seconds"),
            "P99": p(0.99, "llumsched_migration_suspended_seconds"),
        },
        unit="s",
        about="A client's pause is that and one step.",
    ),
    Panel(
        title="Pause of a client",
        queries={
            "P50 {{cause}}": p(0.5, "llumsched_client_pause_seconds", "cause"),
            "P99 {{cause}}": p(0.99, "llumsched_client_pause_seconds", "cause"),
        },
        unit="s",
        about="Between two tokens of a request whose instance changed.",
    ),
    Panel(
        title="Duration",
        queries={
            "P50": p(0.5, "llumsched_migration_seconds"),
            "P99": p(0.99, "llumsched_migration_seconds"),
        },
        unit="s",
    ),
    Panel(
        title="Bytes copied",
        queries={"bytes": "rate(llumsched_migration_bytes_sum[5m])"},
        unit="Bps",
    ),
    Panel(
        title="Blocks and stages, mean",
        queries={
            "blocks": (
                "rate(llumsched_migration_blocks_sum[5m])"
                " / rate(llumsched_migration_blocks_count[5m])"
            ),
            "stages": (
                "rate(llumsched_migration_stages_sum[5m])"
                " / rate(llumsched_migration_stages_count[5m])"
            ),
        },
    ),
    Panel(
        title="Fragmentation",
        queries={"blocks": "llumsched_fragmented_blocks"},
        about="Free blocks of other instances that the first requests in line could use.",
    ),
)

_WITHIN = tuple(
    Panel(
        title=f"First token within {seconds:g} s",
        queries={
            "{{priority_class}}": (
                "sum by (priority_class)"
                f' (rate(llumsched_time_to_first_token_seconds_bucket{{le="{seconds}"}}[5m]))'
                " / sum by (priority_class)"
                " (rate(llumsched_time_to_first_token_seconds_count[5m]))"
            )
        },
        unit="percentunit",
    )
    for seconds in (0.25, 0.5, 1.0, 2.5)
)
SLO = (
    *_WITHIN,
    Panel(
        title="Placement, P99",
        queries={
            "P99 {{priority_class}}": p(0.99, "llumsched_placement_seconds", "priority_class")
        },
        unit="s",
        about="Waiting at the scheduler included.",
    ),
    Panel(
        title="Turned away",
        queries={"{{cause}}": "sum by (cause) (rate(llumsched_rejections_total[5m]))"},
        unit="reqps",
    ),
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
