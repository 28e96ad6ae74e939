"""The catalogue of metrics keeps Prometheus' conventions."""

from __future__ import annotations

import re

import pytest

from llumsched.metrics import CATALOGUE, MetricSpec

TAKEN_BY_PROMETHEUS = {"instance", "job", "le", "quantile", "pid"}
UNITS = {"counter": (), "gauge": (), "histogram": ("seconds", "bytes", "blocks", "stages")}


@pytest.mark.parametrize("spec", CATALOGUE, ids=lambda spec: spec.name)
def test_conventions(spec: MetricSpec) -> None:
    assert re.fullmatch(r"llumsched_[a-z_]+", spec.name)
    assert not spec.name.endswith("_total"), "Prometheus' client adds it"
    assert not TAKEN_BY_PROMETHEUS & set(spec.labels)
    assert spec.help.endswith(".")
    if spec.kind == "histogram":
        assert spec.name.endswith(UNITS["histogram"])
        assert list(spec.buckets) == sorted(spec.buckets)
    assert all(len(values) == len(spec.labels) for values in spec.known)


def test_names_are_used_once() -> None:
    names = [spec.name for spec in CATALOGUE]
    assert len(names) == len(set(names))
