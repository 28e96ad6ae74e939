"""The wheel holds every file of the package once, and what it promises can be imported from it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import llumsched
from llumsched.policies import BUILT_IN
from tests.wheels import ROOT, pip

# What a wheel without its extras can do: nothing of serving, and a simulation.
SIMULATE = """
import sys
sys.path.insert(0, sys.argv[1])
from llumsched.cli import main
sys.exit(main(["simulate", "example", "--requests", "20", "--quiet"]))
"""

# Run where nothing of the checkout can be found, with the wheel's folder as the argument.
LOAD_ENTRY_POINTS = """
import importlib.metadata, json, sys
sys.path.insert(0, sys.argv[1])
distribution = importlib.metadata.distribution("llumsched")
loaded = [(point.group, point.name, point.load()) for point in distribution.entry_points]
print(json.dumps({
    "version": distribution.version,
    "loaded": [[group, name] for group, name, _ in loaded],
    "files": [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "llumsched"],
}))
"""


def test_each_source_file_is_in_the_wheel_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = [name for name in archive.namelist() if ".dist-info/" not in name]
    package = ROOT / "llumsched"
    expected: list[str] = []
    for folder, name in (
        (package, "llumsched"),
        (ROOT / "policies", "llumsched/policies"),
        (ROOT / "simulator", "llumsched/simulator"),
        (ROOT / "configs" / "hardware", "llumsched/simulator/hardware_files"),
    ):
        expected += [
            f"{name}/{path.relative_to(folder)}"
            for path in folder.rglob("*")
            if path.is_file()
            and "__pycache__" not in path.parts
            and not path.is_relative_to(package / "policies")
            and not path.is_relative_to(package / "simulator")
        ]
    assert sorted(packed) == sorted(expected)


def test_the_metadata_says_what_an_index_shows(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    fields, _, description = text.partition("\n\n")
    for field in ("Author: ", "Keywords: ", "Project-URL: ", "License: Apache-2.0"):
        assert f"\n{field}" in fields, field
    for version in ("3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {version}\n" in fields
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert all(link.startswith(("http://", "https://")) for link in links), links


def test_what_a_simulation_imports_is_installed_with_it() -> None:
    """Tests run where the extras are installed as well, so that a missing one is not noticed."""
    imported = {
        name.partition(".")[0]
        for folder in ("llumsched/core", "policies", "simulator")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    } - {"llumsched", *sys.stdlib_module_names}
    required = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert required is not None
    names = {re.split("[>=<]", word)[0] for word in re.findall(r'"([^"]+)"', required[1])}
    modules = {"pyyaml": "yaml", "prometheus-client": "prometheus_client"}
    assert {"msgspec", "numpy"} <= imported <= {modules.get(name, name) for name in names}


def test_the_links_lead_to_the_folders_at_the_top() -> None:
    for name in ("policies", "simulator"):
        link = ROOT / "llumsched" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_a_simulation_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    pip("install", "--target", str(target), str(wheel))
    command = [sys.executable, "-P", "-c", SIMULATE, str(target)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TTFT P99 (s)" in done.stdout


def test_entry_points_load_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    pip("install", "--target", str(target), str(wheel))
    # -P keeps the working directory off the path.
    command = [sys.executable, "-P", "-c", LOAD_ENTRY_POINTS, str(target)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)

    assert found["version"] == llumsched.__version__
    assert ["console_scripts", "llumsched"] in found["loaded"]
    policies = [name for group, name in found["loaded"] if group == "llumsched.policies"]
    assert sorted(policies) == sorted(BUILT_IN)
    assert all(Path(file).is_relative_to(target) for file in found["files"])
