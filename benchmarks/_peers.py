"""Other routers before the same two engines: vllm-router, smg, and vLLM's own data parallelism.

The routers are installed, by pip, into an environment of their own under the cache folder: their
packages must not decide ours. What pip or a router says on failure is passed on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from benchmarks._contest import FLAGS, Contestant, Running
from benchmarks._servers import Server, launched, plain_vllm

PACKAGES = ("vllm-router==0.1.17", "smg==1.13.0")
# vllm-router: each request as it comes, without another try that hides a failure.
ROUTERS: dict[str, tuple[str, ...]] = {
    "vllm-router, round robin": ("vllm-router", "--policy", "round_robin"),
    "vllm-router, power of two": ("vllm-router", "--policy", "power_of_two"),
    "vllm-router, cache-aware": ("vllm-router", "--policy", "cache_aware"),
    "smg, cache-aware": ("smg", "launch", "--policy", "cache_aware"),
}
DATA_PARALLEL = "vLLM, data parallel"
_INSTALL_TIMEOUT_S = 600.0


def peers() -> list[Contestant]:
    """Every router, each before two plain servers of its own, and data parallelism of two."""
    folder = environment()
    routed = [
        Contestant(name=name, start=_Routed(folder, command).start)
        for name, command in ROUTERS.items()
    ]
    return [*routed, Contestant(name=DATA_PARALLEL, start=_data_parallel)]


class _Routed:
    """A router's command, and the environment that it is in."""

    def __init__(self, environment: Path, command: Sequence[str]) -> None:
        self._environment = environment
        self._command = command

    @contextmanager
    def start(self) -> Iterator[Running]:
        with ExitStack() as stack:
            # One after another: two that measure free memory at a time count each other's.
            engines = [stack.enter_context(plain_vllm(FLAGS)) for _ in range(2)]
            urls = tuple(engine.url for engine in engines)
            program, *flags = self._command
            command = [str(self._environment / "bin" / program), *flags, "--worker-urls", *urls]
            url, pid = stack.enter_context(launched(" ".join(self._command), command))
            server = Server(url=url, model=engines[0].model, pid=pid)
            yield Running(server=server, engines=urls, engine_pids=_engine_pids(engines))


@contextmanager
def _data_parallel() -> Iterator[Running]:
    with plain_vllm((*FLAGS, "--data-parallel-size", "2")) as server:
        yield Running(server=server, engines=(server.url,), engine_pids=_engine_pids([server]))


def _engine_pids(servers: Sequence[Server]) -> tuple[int, ...]:
    return tuple(
        process.pid
        for server in servers
        for process in psutil.Process(server.pid).children(recursive=True)
        if "EngineCore" in process.name()
    )


def environment() -> Path:
    """The folder of the routers' environment, made at first use."""
    cache = Path(os.environ.get("LLUMSCHED_CACHE_DIR") or Path(__file__).parents[1] / ".cache")
    folder = cache / "peers"
    done = folder / "installed"
    if not done.exists() or done.read_text(encoding="utf-8").split() != list(PACKAGES):
        print("installing the peers", file=sys.stderr, flush=True)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(folder / "bin" / "pip"), "install", "--quiet", *PACKAGES],
        ):
            subprocess.run(command, check=True, timeout=_INSTALL_TIMEOUT_S)
        done.write_text("\n".join(PACKAGES), encoding="utf-8")
    return folder
