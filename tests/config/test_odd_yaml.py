"""Files and addresses of every front door: whatever they are, a value or one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given

from llumsched.config import ConfigError
from llumsched.config import load as load_config
from llumsched.flags import server_url
from llumsched.jobs.spec import SpecError
from llumsched.jobs.spec import load as load_jobs
from llumsched.proxy.backends import BackendError, parse_backend, read_backends
from llumsched.simulator.hardware.spec import HardwareError, load_hardware
from tests.simulator.test_odd_files import SEVERAL, damaged, is_one_sentence

BACKENDS = b"""\
policy: prefix_aware
backends:
  - http://10.0.0.1:8000
  - {url: "http://10.0.0.2:8000", weight: 2, role: prefill, max_adapters: 8}
"""
JOBS = b"""\
jobs:
  - name: night
    scale: {instances: 4}
    cron: "0 22 * * *"
    timezone: Europe/Berlin
    window: {from: "22:00", to: "06:00"}
  - name: report
    http: {url: "http://10.0.0.9/{shard}", headers: {a: b}}
    at: ["2027-01-31T22:00:00"]
    shards: [a, b]
    retry: {tries: 3, wait_s: 5}
"""
READERS: list[tuple[Callable[[Path], Any], type[Exception]]] = [
    (read_backends, BackendError),
    (load_jobs, SpecError),
    (load_config, ConfigError),
    (load_hardware, HardwareError),
]
ODD = {
    "a date that is none": b"a: 2026-99-99",
    "a date as a key": b"backends: [http://a]\n2026-99-99: 1",
    "an infinite number": b"backends: [{url: 'http://a', max_adapters: .inf, weight: 1}]",
    "a number that is no float": b"backends: [{url: 'http://a', weight: " + b"9" * 400 + b"}]",
    "a Python object": b"!!python/object:x 1",
    "itself": b"a: &a [*a]",
    "no text": b"\xff\xfe",
    "a control character": b"\x01",
    "deep": b"[" * 3000,
    "a broken address": b"jobs: [{name: a, http: {url: 'http://['}, at: ['2026-01-01']}]",
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
@pytest.mark.parametrize(("read", "kind"), READERS, ids=lambda value: value.__name__)
def test_an_odd_file_is_one_sentence_that_names_it(
    tmp_path: Path, read: Callable[[Path], Any], kind: type[Exception], content: bytes
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(kind, match=r"odd\.yaml"):
        is_one_sentence(lambda: read(path), AssertionError)
    is_one_sentence(lambda: read(path), kind)


def test_dates_are_dates_whatever_else_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_text = yaml.SafeLoader.yaml_constructors["tag:yaml.org,2002:str"]
    monkeypatch.setitem(yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:timestamp", as_text)
    path = tmp_path / "odd.yaml"
    path.write_bytes(ODD["a date as a key"])
    with pytest.raises(BackendError):
        read_backends(path)


@given(damaged([BACKENDS]))
@SEVERAL
def test_a_damaged_list_of_servers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "servers.yaml"
    path.write_bytes(data)
    is_one_sentence(lambda: read_backends(path), BackendError)


@given(damaged([JOBS]))
@SEVERAL
def test_a_damaged_list_of_jobs(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_bytes(data)
    is_one_sentence(lambda: load_jobs(path), SpecError)


@pytest.mark.parametrize(
    "text",
    ["http://[", "http://a:99999999", "http://a:b", "http://a b", "http://a\n", "http://:80", "a"],
)
def test_an_address_that_is_none_is_said_by_every_flag(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="give the whole address"):
        server_url(text)
    with pytest.raises(BackendError, match="give the whole address"):
        parse_backend(text)
