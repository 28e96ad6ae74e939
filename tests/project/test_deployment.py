"""Containers, Kubernetes and systemd: what can be checked of them without a cluster."""

from __future__ import annotations

import os
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


KUBERNETES = "1.30"


def validate(manifest: dict[str, Any]) -> None:
    """Kubernetes' own schema takes it, without a key that it does not know."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"serviceMonitor": True, "args": ["--policy=slo"], "service": {"type": "NodePort"}},
        {"gpus": 1, "instances": 2, "shutdownTimeoutSeconds": 5},
    ],
    ids=["defaults", "more", "small"],
)
def test_helm_makes_what_kubernetes_takes(values: dict[str, Any]) -> None:
    """By Helm's own code, which is in a package of Python's index, without its program."""
    helm = pytest.importorskip("helm_python")
    with helm.Chart.load(str(CHART)) as chart:
        rendered = chart.render(values, name="pool")
    made = [d for text in rendered.values() for d in yaml.safe_load_all(text) if d]
    kinds = sorted(d["kind"] for d in made)
    assert kinds == ["Deployment", "Service"] + ["ServiceMonitor"] * ("serviceMonitor" in values)
    for manifest in made:
        if manifest["kind"] != "ServiceMonitor":  # a definition of the Prometheus operator
            validate(manifest)
    (deployment,) = (d for d in made if d["kind"] == "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    shutdown_s = int(container["args"][2].removeprefix("--shutdown-timeout="))
    assert spec["terminationGracePeriodSeconds"] > shutdown_s
    assert container["args"][3:] == values.get("args", [])
    assert not helm.lint(str(CHART))["errors"]


def test_kubernetes_takes_the_pods_and_the_other_parts_of_the_ray_cluster() -> None:
    """The schema of a RayCluster is KubeRay's; that of its pods is Kubernetes'."""
    cluster, *others = documents("kuberay.yaml")
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        template = group["template"]
        metadata = {"name": "pod", **template.get("metadata", {})}
        validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        )
    for manifest in others:
        if "." not in manifest["apiVersion"].partition("/")[0]:
            validate(manifest)


# Of KubeRay's types of version v1; each field that is named here is of this kind.
RAY_CLUSTER: dict[str, type] = {"headGroupSpec": dict, "workerGroupSpecs": list}
HEAD_GROUP: dict[str, type] = {"rayStartParams": dict, "template": dict}
WORKER_GROUP: dict[str, type] = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    **HEAD_GROUP,
}


def test_the_ray_cluster_has_the_fields_of_kuberay_s_types() -> None:
    """KubeRay's definition cannot be had from a package index, so its fields are named here."""
    cluster, _ = documents("kuberay.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    head, workers = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    parts: list[tuple[dict[str, Any], dict[str, type]]] = [
        (cluster["spec"], RAY_CLUSTER),
        (head, HEAD_GROUP),
        *((group, WORKER_GROUP) for group in workers),
    ]
    for found, fields in parts:
        assert found.keys() == fields.keys()
        assert all(type(found[name]) is kind for name, kind in fields.items())
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_kuberay_s_own_definition_takes_the_whole_ray_cluster() -> None:
    """`LLUMSCHED_KUBERAY_CRD` is the path of its `ray.io_rayclusters.yaml`, from its repository."""
    path = os.environ.get("LLUMSCHED_KUBERAY_CRD")
    if path is None:
        pytest.skip("LLUMSCHED_KUBERAY_CRD names none")
    jsonschema = pytest.importorskip("jsonschema")
    definition = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft7Validator(schema)
    cluster, _ = documents("kuberay.yaml")
    assert [error.message for error in validator.iter_errors(cluster)] == []
    cluster["spec"]["workerGroupSpecs"][0]["replica"] = 1
    (error,) = validator.iter_errors(cluster)
    assert "'replica' was unexpected" in error.message


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of Kubernetes' that takes no field which it does not name."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = dict(schema)
    if "items" in schema:
        found["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = closed(schema["additionalProperties"])
    if "properties" in schema:
        found["properties"] = {name: closed(of) for name, of in schema["properties"].items()}
        is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
        found.setdefault("additionalProperties", bool(is_open))
    return found


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
