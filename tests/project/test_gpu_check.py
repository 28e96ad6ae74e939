"""The check for one GPU: what of it needs no GPU passes, and needs neither vLLM nor Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llumsched

ROOT = Path(llumsched.__file__).parents[1]
# Imports of these fail as if they were not installed, in the processes that it starts as well.
WITHOUT = "raise ImportError('there is neither vLLM nor Ray on a machine of this check')\n"


def test_its_half_on_a_cpu(tmp_path: Path) -> None:
    for name in ("vllm", "ray"):
        (tmp_path / f"{name}.py").write_text(WITHOUT)
    done = subprocess.run(
        [sys.executable, "-m", "scripts.gpu_check", "--device", "cpu", "--small"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("FAIL")]
    assert len([line for line in lines if line.startswith("PASS")]) >= 11, done.stdout
    for passed in ("blocks in every layout", "a request moves by tcp", "instance b dies at"):
        assert [line for line in lines if line.startswith(f"PASS {passed}")], done.stdout
