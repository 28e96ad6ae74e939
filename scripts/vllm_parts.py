"""Parts of an engine of another vLLM, under test: `make vllm-parts VERSION=0.33.0`.

A release without a build for CPUs cannot run here as a whole. What of it is Python can: its
scheduler, its block managers, the KV cache's layouts, the request state of model runner V2, its
messages. Its sources, from the wheel that `make vllm-diff` unpacks, are put ahead of the installed
vLLM, and the tests of those parts run on them, with torch and the other libraries as they are
installed. No kernel of it runs, and no model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from llumsched.flags import Parser
from scripts.vllm_diff import sources_of

ROOT = Path(__file__).parents[1]
PARTS = (
    "tests/engine/test_version_check.py",
    "tests/engine/test_batch.py",
    "tests/engine/test_refusals.py",
    "tests/engine/test_prefix_blocks.py",
    "tests/engine/test_kv.py",
    "tests/engine/test_groups.py",
    "tests/engine/test_connectors.py",
    "tests/engine/test_multimodal.py",
    "tests/engine/test_resumption.py",
    "tests/engine/test_room.py",
    "tests/frontend/test_paused_engines.py",
    "tests/frontend/test_successor.py",
)
"""Tests that need vLLM's Python code, and none of its kernels."""


def main(argv: list[str] | None = None) -> int:
    """Exit status of pytest."""
    parser = Parser(prog="vllm_parts", description=__doc__)
    parser.add_argument("version", help="a release of vLLM, such as 0.33.0")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        put_ahead(Path(folder), arguments.version)
        found = [folder, str(ROOT), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-m", "pytest", *PARTS, *arguments.pytest]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))}
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def put_ahead(folder: Path, version: str) -> None:
    """Make a folder that, first in `PYTHONPATH`, is a vLLM of this version built for CPUs."""
    (folder / "vllm").symlink_to(sources_of(version).folder / "vllm")
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    # By its local part vLLM knows what it was built for.
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    sys.exit(main())
