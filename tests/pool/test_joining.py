"""A frontend finds a pool in a Ray cluster, and says why it cannot join one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from llumsched import __version__
from llumsched.pool import joining
from llumsched.pool.joining import Here, Invitation, invited, take_environment
from llumsched.pool.ray_cluster import LaunchError
from llumsched.scheduler.actor import ACTOR_NAME

ADDRESS = "head:6379"
VLLM = "0.32.0"
HERE = Here(host="10.0.0.2", node_id="this node")


def invitation(**changes: Any) -> Invitation:
    values: dict[str, Any] = {
        "llumsched": __version__,
        "vllm": VLLM,
        "model": "a/model",
        "door": "tcp://10.0.0.1:1",
        "scheduler": "tcp://10.0.0.1:2",
        "loopback_of": None,
        "environment": {},
        "plan": b"",
    }
    return cast(Invitation, values | changes)


class Cluster:
    """A Ray cluster: ``servers`` are the answers of their schedulers, by process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.servers: dict[str, Any] = {}
        self.attached: list[str] = []
        self.refusal: Exception | None = None
        monkeypatch.setattr(ray, "init", self._init)
        monkeypatch.setattr(ray, "shutdown", self.attached.clear)
        monkeypatch.setattr(ray, "get_actor", self._get_actor)
        monkeypatch.setattr(ray, "get", self._get)
        monkeypatch.setattr(joining, "list_named_actors", self._list)
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: HERE.host)
        context = SimpleNamespace(get_node_id=lambda: HERE.node_id)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)

    def _init(self, *, address: str, **_: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.attached.append(address)

    def _list(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces, "each server has a namespace of its own"
        names = [f"{ACTOR_NAME}-{pid}" for pid in self.servers]
        return [{"name": name, "namespace": f"of {name}"} for name in ("another's", *names)]

    def _get_actor(self, name: str, *, namespace: str) -> Any:
        assert namespace == f"of {name}"
        answer = self.servers[name.rpartition("-")[2]]
        if answer == "old":
            return SimpleNamespace()
        return SimpleNamespace(invitation=SimpleNamespace(remote=lambda: answer))

    def _get(self, answer: Any, *, timeout: float) -> Any:
        assert timeout > 0
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def refusal(name: str | None = None) -> str:
    with pytest.raises(LaunchError) as refused:
        invited(ADDRESS, name, VLLM)
    said = str(refused.value)
    assert "\n" not in said
    return said


def test_the_only_pool_is_found_and_ray_let_go(cluster: Cluster) -> None:
    cluster.servers["41"] = invitation()
    assert invited(ADDRESS, None, VLLM) == (invitation(), HERE)
    assert not cluster.attached


def test_one_of_several_is_named(cluster: Cluster) -> None:
    cluster.servers |= {"41": invitation(), "42": invitation(model="another")}
    assert invited(ADDRESS, "42", VLLM)[0]["model"] == "another"
    assert refusal() == (
        "2 llumsched servers run in the Ray cluster at head:6379: name the process of one with "
        "--pool, of 41, 42."
    )
    assert refusal("43") == (
        "There is no server 43 in the Ray cluster at head:6379: give --pool one of 41, 42, or leave"
        " it out if there is but one."
    )


def test_a_pool_that_is_not_there(cluster: Cluster) -> None:
    assert refusal() == (
        "No llumsched server runs in the Ray cluster at head:6379: start one with 'llumsched serve "
        "MODEL --any-node --ray-address head:6379' first."
    )


MISMATCH = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.55.0\n    Python: 3.11.7\n"
    "This process was started with:\n    Ray: 2.60.0\n    Python: 3.11.9\n"
)
NO_CLUSTER = (
    "There is no Ray cluster at head:6379: give the address of the server's, which 'ray start' "
    "names on its head."
)
OTHER_RAY = (
    "The Ray cluster at head:6379 is not of the same versions as this Ray (cluster: Ray 2.55.0, "
    "Python 3.11.7; here: Ray 2.60.0, Python 3.11.9). Install those of the cluster here."
)
NO_NODE = (
    "This machine is not part of the Ray cluster at head:6379 (No node here.): run 'ray start "
    "--address=head:6379' here first."
)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConnectionError(), NO_CLUSTER),
        (RuntimeError(MISMATCH), OTHER_RAY),
        (RuntimeError("No node here.\nAnd more."), NO_NODE),
    ],
)
def test_a_cluster_that_this_machine_cannot_attach_to(
    cluster: Cluster, raised: Exception, said: str
) -> None:
    cluster.refusal = raised
    assert refusal() == said


def test_another_version(cluster: Cluster) -> None:
    cluster.servers["41"] = invitation(llumsched="0.0.1")
    assert refusal() == (
        f"The server is llumsched 0.0.1 on vLLM {VLLM}, and this is llumsched {__version__} on vLLM"
        f" {VLLM}: install those versions here."
    )
    cluster.servers["41"] = invitation(vllm="0.33.0")
    assert "llumsched serve" not in refusal()
    cluster.servers["41"] = "old"
    assert refusal() == (
        "The server is of an llumsched whose pools no frontend can join: start one of llumsched "
        f"{__version__} there."
    )


def test_a_pool_on_the_loopback_of_another_machine(cluster: Cluster) -> None:
    cluster.servers["41"] = invitation(loopback_of="another node")
    assert refusal() == (
        "The server listens on the loopback of its own machine: start it with --any-node to have "
        "frontends on others, or start this one there."
    )
    cluster.servers["41"] = invitation(loopback_of=HERE.node_id)
    assert invited(ADDRESS, None, VLLM)[1] == HERE


@pytest.mark.parametrize("raised", [ray.exceptions.ActorDiedError(), TimeoutError()])
def test_a_scheduler_that_does_not_answer(cluster: Cluster, raised: Exception) -> None:
    cluster.servers["41"] = raised
    assert refusal() == (
        f"The global scheduler of the server does not answer ({type(raised).__name__}): try again "
        "once the server says that it serves."
    )


def test_a_ray_of_the_servers_own(cluster: Cluster) -> None:
    cluster.servers["41"] = None
    assert "ray start --head" in refusal()


def test_this_machine_s_own_settings_hold() -> None:
    environment = {"HF_HOME": "/here"}
    told = {"HF_HOME": "/there", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60"}
    take_environment(invitation(environment=told), environment)
    assert environment == {"HF_HOME": "/here", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60"}
