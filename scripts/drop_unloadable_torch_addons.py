"""Uninstall torchvision, torchaudio and torchcodec where they cannot load beside the torch here.

vLLM names all three, and a package index without their CPU builds supplies those for CUDA, which
fail on import beside a CPU torch. transformers imports torchvision when it finds it, so that a text
model then fails to load as well. llumsched needs none of them; one that loads is left in place.
"""

import importlib.util
import subprocess
import sys

ADDONS = ("torchvision", "torchaudio", "torchcodec")


def loads(module: str) -> bool:
    """True if a fresh interpreter can import ``module``."""
    command = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Uninstall the ones that are present and do not load."""
    broken = [name for name in ADDONS if importlib.util.find_spec(name) and not loads(name)]
    if not broken:
        return 0
    print(f"uninstalling {', '.join(broken)}: built for another torch, and not needed here")
    command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
