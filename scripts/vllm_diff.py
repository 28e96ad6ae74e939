"""Changes in a version of vLLM: `make vllm-diff VERSION=0.33.0`.

Its wheel is downloaded and unpacked, not installed, and no line of it is run. Printed are the
internals that it lacks, and those whose code is not that of the version before: bodies to be read
before the version joins the window (docs/extending.md says how). A fingerprint of all of them is
written beside this script; a test compares that of the installed version.
"""

from __future__ import annotations

import difflib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llumsched.engine.vllm.compat import installed_folder, installed_version
from llumsched.engine.vllm.sources import Sources, source_of
from llumsched.engine.vllm.version_check import bodies, fingerprint, what_moved
from llumsched.flags import Parser
from scripts.prepare_model import default_cache_dir

FINGERPRINTS = Path(__file__).with_name("vllm_fingerprints")


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if something that is used is not there."""
    parser = Parser(prog="vllm_diff", description=__doc__)
    parser.add_argument("version", help="a release of vLLM, such as 0.33.0")
    parser.add_argument("--base", help="compare with this version (default: the one before it)")
    parser.add_argument("--show", action="store_true", help="print the changed lines as well")
    arguments = parser.parse_args(argv)
    sources = sources_of(arguments.version)
    moved = what_moved(sources)
    print(f"vLLM {arguments.version}: {len(moved)} of what is used is not there")
    for complaint in moved:
        print(f"  {complaint}")
    base = arguments.base or version_before(arguments.version)
    if base is not None:
        print_changes(sources_of(base), sources, base, show=arguments.show)
    print(f"written: {write_fingerprint(arguments.version, sources)}")
    return 1 if moved else 0


def sources_of(version: str) -> Sources:
    """The installed vLLM if it is this one, else that of the package index."""
    if version == installed_version():
        return Sources(installed_folder())
    folder = default_cache_dir() / "vllm" / version
    if not folder.is_dir():
        _download(version, folder)
    return Sources(folder)


def _download(version: str, folder: Path) -> None:
    """The Python files of a wheel. It is half a gigabyte, most of which is not kept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        options = ["--only-binary=:all:", "--dest", temporary]
        print(f"downloading vllm=={version}", flush=True)
        subprocess.run([*command, *options, f"vllm=={version}"], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and name.endswith(".py"):
                    archive.extract(name, unpacked)
        shutil.move(unpacked, folder)


def version_before(version: str) -> str | None:
    """The newest version with a fingerprint that is older than this one."""
    older = [v for v in fingerprinted_versions() if _as_numbers(v) < _as_numbers(version)]
    return max(older, key=_as_numbers, default=None)


def fingerprinted_versions() -> list[str]:
    """Versions whose fingerprint is kept."""
    return sorted((path.stem for path in FINGERPRINTS.glob("*.json")), key=_as_numbers)


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def print_changes(old: Sources, new: Sources, base: str, *, show: bool) -> None:
    """Every body that differs, with the number of lines that do."""
    before, after = bodies(old), bodies(new)
    changes: list[tuple[str, list[str]]] = []
    digests = fingerprint(old), fingerprint(new)
    for label in sorted(before.keys() | after.keys()):
        if digests[0].get(label) == digests[1].get(label):
            continue
        old_text = source_of(before[label]) if label in before else []
        new_text = source_of(after[label]) if label in after else []
        lines = list(difflib.unified_diff(old_text, new_text, lineterm="", n=2))[2:]
        changes.append((label, lines))
    print(f"since {base}: {len(changes)} of {len(after)} bodies changed; read them")
    for label, lines in changes:
        num_changed = sum(line[:1] in ("+", "-") for line in lines)
        state = " (new)" * (label not in before) + " (gone)" * (label not in after)
        print(f"  {num_changed:4d} lines  {label}{state}")
        if show:
            print("\n".join(f"        {line}" for line in lines))


def write_fingerprint(version: str, sources: Sources) -> Path:
    """Keep what the bodies of this version are."""
    path = FINGERPRINTS / f"{version}.json"
    content = {"vllm": version, "bodies": fingerprint(sources)}
    FINGERPRINTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def read_fingerprint(version: str) -> dict[str, str]:
    """The digests that were kept of a version, by label."""
    path = FINGERPRINTS / f"{version}.json"
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["bodies"]
    return found


if __name__ == "__main__":
    sys.exit(main())
