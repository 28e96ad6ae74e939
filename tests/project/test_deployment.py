"""Containers, Kubernetes and systemd: what can be checked of them without a cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llumsched import __version__
from tests.wheels import ROOT

CONFIGS = ROOT / "configs"
CHART = CONFIGS / "kubernetes" / "chart"
DOCKERFILES = sorted((CONFIGS / "docker").glob("Dockerfile.*"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_there_is_and_serves(path: Path) -> None:
    text = path.read_text()
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
    assert '"llumsched", "serve"' in text
    # A server that others can reach has its admin API only if it is asked for.
    assert "--admin-api=on" in text


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CONFIGS / "kubernetes" / name).read_text()))


def test_a_worker_that_goes_is_drained_first_and_has_the_time() -> None:
    cluster, _ = documents("kuberay.yaml")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert command.startswith('llumsched drain --node "$POD_IP"')
    timeout_s = int(re.search(r"--timeout (\d+)", command)[1])  # type: ignore[index]
    assert pod["terminationGracePeriodSeconds"] > timeout_s


def test_ray_ends_no_instance_for_the_memory_of_others() -> None:
    cluster, _ = documents("kuberay.yaml")
    spec = cluster["spec"]
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in pods:
        (container,) = pod["template"]["spec"]["containers"]
        settings = {e["name"]: e.get("value") for e in container["env"]}
        assert settings["RAY_memory_monitor_refresh_ms"] == "0"
        assert settings["RAY_worker_oom_score_adjustment"] == "0"


def test_probes_ask_for_paths_that_want_no_key() -> None:
    text = (CONFIGS / "kubernetes" / "kuberay.yaml").read_text()
    text += (CHART / "templates" / "deployment.yaml").read_text()
    assert set(re.findall(r"httpGet: \{path: (\S+),", text)) == {"/health", "/ping"}


def test_the_chart_uses_values_that_it_has_and_has_none_that_it_does_not_use() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    used = set()
    for template in (CHART / "templates").glob("*.yaml"):
        used |= set(re.findall(r"\.Values\.([\w.]+)", template.read_text()))
    for path in used:
        found: Any = values
        for part in path.split("."):
            assert part in found, path
            found = found[part]
    assert {path.partition(".")[0] for path in used} == values.keys()
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
def test_helm_renders_the_chart() -> None:
    command = ("helm", "template", "pool", str(CHART), "--set", "serviceMonitor=true")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = [document["kind"] for document in yaml.safe_load_all(done.stdout)]
    assert sorted(kinds) == ["Deployment", "Service", "ServiceMonitor"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (CONFIGS / "systemd" / "llumsched.service").read_text()
    unit = tmp_path / "llumsched.service"
    # The program and the user of the unit are not on this machine.
    unit.write_text(
        text.replace("/opt/llumsched/bin/llumsched", "/bin/true").replace("User=llumsched\n", "")
    )
    done = subprocess.run(
        ("systemd-analyze", "verify", str(unit)), capture_output=True, text=True, check=False
    )
    assert "llumsched.service" not in done.stderr, done.stderr
