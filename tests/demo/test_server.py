"""Nothing that the demo starts outlives it, whatever its server does."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import server_process
from scripts.demo import server as module
from scripts.demo.server import Server, ServerFailed
from scripts.server_process import Ending

LISTEN = """
import socket
port = int(sys.argv[sys.argv.index("--port") + 1])
listener = socket.create_server(("127.0.0.1", port))
"""


@pytest.fixture
def make_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Server]:
    """A server whose program is the given one instead of llumsched."""

    def make(program: str) -> Server:
        script = tmp_path / "program.py"
        script.write_text(f"import os, signal, subprocess, sys, time\n{program}")
        monkeypatch.setattr(module, "PROGRAM", (sys.executable, str(script)))
        return Server("a model", ("--instances 2",), tmp_path / "logs" / "server.log")

    return make


def is_alive(pid: int) -> bool:
    try:
        return b"Z" not in Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:1]
    except OSError:
        return False


def wait_for(path: Path) -> str:
    deadline_s = time.monotonic() + 10
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline_s, f"{path} was never written"
        time.sleep(0.01)
    return path.read_text()


def test_it_says_what_the_server_says_and_logs_everything(
    make_server: Callable[[str], Server],
) -> None:
    server = make_server(
        LISTEN + "print('noise', sys.argv[1:4], flush=True)\n"
        "print('(llumsched pid=1) INFO 11-30 16:40:02 [pool.py:1] booting', flush=True)\n"
        "print('(llumsched pid=1) INFO 11-30 16:40:03 [vllm.py:3] using V1', flush=True)\n"
        "print('(llumsched pid=1) INFO 11-30 16:40:09 [launcher.py:2] serving it', flush=True)\n"
        "time.sleep(60)"
    )
    said: list[str] = []

    async def run() -> Ending:
        server.serve()
        await server.boot(said.append)
        return await asyncio.to_thread(server.end)

    ending = asyncio.run(run())
    server.close()
    assert said == ["booting", "serving it"]
    assert (
        server.log_path.read_text().splitlines()[0] == "noise ['serve', 'a model', '--instances']"
    )
    assert (ending.num_processes, ending.killed, ending.left) == (1, (), ())


def test_a_server_that_refuses_is_quoted(make_server: Callable[[str], Server]) -> None:
    server = make_server("sys.exit('llumsched serve: There is no model at x: give a folder.')")

    async def run() -> None:
        server.serve()
        try:
            await server.boot(lambda _: None)
        finally:
            await asyncio.to_thread(server.end)

    with pytest.raises(ServerFailed, match=r"the server ended: There is no model at x: give a f"):
        asyncio.run(run())
    server.close()


def test_a_server_that_dies_while_it_serves_is_noticed(
    make_server: Callable[[str], Server],
) -> None:
    server = make_server(LISTEN + "print('llumsched: serving', flush=True)\nos._exit(7)")

    async def run() -> None:
        server.serve()
        try:
            async with asyncio.timeout(10):
                await server.ended()
        finally:
            await asyncio.to_thread(server.end)

    with pytest.raises(ServerFailed, match="exit status 7"):
        asyncio.run(run())
    server.close()


def test_of_a_log_the_errors_are_shown(make_server: Callable[[str], Server]) -> None:
    server = make_server(
        "print('noise', '\\x1b[31mERROR: first\\x1b[0m', sep='\\n')\n"
        "print('noise: OSError: maybe', 'ValueError: second', sep='\\n')"
    )

    async def run() -> None:
        server.serve()
        with pytest.raises(ServerFailed):
            await server.ended()

    asyncio.run(run())
    assert server.telling_lines(4) == ["ERROR: first", "ValueError: second"]
    server.close()


@pytest.mark.parametrize("environment", ["dict(os.environ)", "{}"], ids=["", "without_environment"])
def test_a_child_that_left_the_family_and_hears_nothing_is_ended_too(
    make_server: Callable[[str], Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: str,
) -> None:
    monkeypatch.setattr(server_process, "END_TIMEOUT_S", 0.5)
    deaf = (
        "import os, signal, time\n"
        "[signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT)]\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    server = make_server(
        f"subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True,"
        f" env={environment})\n"
        "time.sleep(60)"
    )

    async def run() -> tuple[int, Ending]:
        server.serve()
        pid = int(await asyncio.to_thread(wait_for, tmp_path / "pid"))
        return pid, await asyncio.to_thread(server.end)

    pid, ending = asyncio.run(run())
    server.close()
    assert not is_alive(pid)
    assert ending.num_processes == 2
    assert len(ending.killed) == 1
    assert ending.left == ()


def test_the_last_resort_works_without_a_loop(
    make_server: Callable[[str], Server], tmp_path: Path
) -> None:
    server = make_server(
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )

    async def run() -> int:
        server.serve()
        return int(await asyncio.to_thread(wait_for, tmp_path / "pid"))

    pid = asyncio.run(run())
    server.close()
    deadline_s = time.monotonic() + 5
    while is_alive(pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_no_other_process_is_ever_found(make_server: Callable[[str], Server]) -> None:
    server = make_server("")
    try:
        assert server.processes() == {}
        assert os.getpid() not in server.processes()
    finally:
        server.close()


def test_rays_folder_is_private_and_goes(make_server: Callable[[str], Server]) -> None:
    server = make_server(
        "sys.exit(os.environ['RAY_TMPDIR'] + ' ' + str('RAY_ADDRESS' in os.environ))"
    )

    async def run() -> None:
        server.serve()
        with pytest.raises(ServerFailed):
            await server.ended()

    os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    try:
        asyncio.run(run())
    finally:
        del os.environ["RAY_ADDRESS"]
    folder, _, has_address = server.telling_lines(1)[0].partition(" ")
    assert Path(folder).is_dir()
    assert has_address == "False"
    server.close()
    assert not Path(folder).exists()
