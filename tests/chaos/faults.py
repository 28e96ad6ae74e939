"""Faults of a pool, done to a running one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil

from tests.chaos import saboteur
from tests.e2e.client import Admin, Answer
from tests.e2e.servers import Server

# Another instance has to load the model, on a machine that is busy.
SERVING_TIMEOUT_S = 240.0
POLL_INTERVAL_S = 0.05


class FaultyPool(Admin):
    """The admin API of a server, and signals to its processes."""

    def __init__(
        self, server: Server, model: str, folder: Path, api_key: str | None = None
    ) -> None:
        super().__init__(server.url, model, api_key)
        self.server = server
        self._folder = folder

    @classmethod
    @contextmanager
    def until_its_end(
        cls,
        server: Server,
        model: str,
        folder: Path,
        await_boot: Callable[[], None],
        api_key: str | None = None,
    ) -> Iterator[Self]:
        """The pool of a server, which ends after it. No process of it may outlive it."""
        try:
            await_boot()
            pool = cls(server, model, folder, api_key)
            yield pool
            pool.close()
        finally:
            ending = server.end()
        assert not ending.killed, f"left after SIGTERM: {ending.killed}\n{server.log()[-4000:]}"

    def berths(self) -> list[dict[str, Any]]:
        answer = self.get("/llumsched/instances")
        assert answer.status == 200, answer
        found: list[dict[str, Any]] = answer.body["berths"]
        return found

    def running(self) -> list[str]:
        """Instances that run, by id."""
        return sorted(b["instance_id"] for b in self.berths() if b["state"] == "running")

    def serving(self) -> list[str]:
        """Instances that the scheduler gives requests to."""
        answer = self.get("/llumsched/instances")
        if answer.status != 200:
            return []  # the scheduler is away
        return sorted(i["instance_id"] for i in answer.body["instances"] if i["state"] == "serving")

    def frontends(self) -> dict[str, dict[str, Any]]:
        """Every place of a frontend, by its id."""
        answer = self.get("/llumsched/instances")
        assert answer.status == 200, answer
        return {f["frontend_id"]: f for f in answer.body["frontends"]}

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        (line,) = (x for x in self.text("/metrics").splitlines() if x.startswith(f"{name} "))
        return float(line.split()[1])

    def await_serving(self, num_instances: int) -> None:
        """Wait until so many instances run and take requests."""
        deadline_s = time.monotonic() + SERVING_TIMEOUT_S
        while len(self.serving()) < num_instances:
            assert time.monotonic() < deadline_s, f"still not {num_instances} instances"
            time.sleep(POLL_INTERVAL_S)

    def await_rebuilt(self, instance_ids: list[str]) -> float:
        """Wait until a scheduler that was started again knows these, and what is on each.

        Returns:
            how old it was when it was first seen to, in seconds.
        """
        deadline_s = time.monotonic() + SERVING_TIMEOUT_S
        while True:
            answer = self.get("/llumsched/instances")
            if answer.status == 200:
                found = {i["instance_id"]: i for i in answer.body["instances"]}
                if all(
                    i in found and found[i]["state"] == "serving" and found[i]["load"]
                    for i in instance_ids
                ):
                    return float(answer.body["scheduler_age_s"])
            assert time.monotonic() < deadline_s, f"it does not know {instance_ids}: {answer}"
            time.sleep(POLL_INTERVAL_S)

    def pid(self, instance_id: str) -> int:
        """The process of an instance."""
        (pid,) = (b["pid"] for b in self.berths() if b["instance_id"] == instance_id)
        return int(pid)

    def signal(self, instance_id: str, number: signal.Signals) -> None:
        """Send a signal to the process of an instance."""
        os.kill(self.pid(instance_id), number)

    def hang_loop(self, instance_id: str) -> None:
        """Have the loop of an instance's engine wait for ever, while its process lives."""
        saboteur.tell(self._folder, self.pid(instance_id), saboteur.HANG)

    def break_connections(self, instance_id: str) -> None:
        """Break the connections of an instance to the frontends; ZMQ makes them again."""
        ports = {
            connection.laddr.port
            for frontend in self.frontends().values()
            for connection in psutil.Process(frontend["pid"]).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        saboteur.tell(self._folder, self.pid(instance_id), saboteur.BREAK, *ports)

    def scheduler_pids(self) -> list[int]:
        """The process of the global scheduler; none while Ray starts it again."""
        processes = self.server.processes().items()
        return [pid for pid, name in processes if name.startswith("ray::SchedulerActor")]

    def kill_scheduler(self) -> None:
        """End the process of the global scheduler; Ray starts it again."""
        pids = self.scheduler_pids()
        assert pids, self.server.processes()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def drain(self, instance_id: str, **body: Any) -> Answer:
        return self.post(f"/llumsched/instances/{instance_id}/drain", body)
