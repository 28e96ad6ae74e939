"""Whatever is in a file, a reader makes one clear sentence of it, or a value: never a traceback."""

from __future__ import annotations

import gzip
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llumsched.config import Config, ConfigError, load
from llumsched.core.actions import DispatchRequest
from llumsched.core.events import InstanceJoined, RequestArrived, Ticked
from llumsched.core.load import InstanceSpec
from llumsched.core.types import SchedulingRequest
from llumsched.decision_log import DecisionLog, DecisionLogError, read_segment
from llumsched.simulator.hardware.model_shape import ShapeError, read_shape
from llumsched.simulator.hardware.spec import FOLDER, HardwareError, load_hardware
from llumsched.simulator.traces.loaders import load_trace
from llumsched.simulator.traces.trace import Trace, TraceError
from tests.campaigns import examples
from tests.wheels import ROOT

SAMPLES = Path(__file__).parent / "samples"
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

SEVERAL = settings(
    max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ODD_WORDS = st.sampled_from(
    [
        *(b"", b"0", b"-1", b"1e999", b"nan", b"NaN", b"null", b"true", b"1" * 5000, b"9" * 30),
        *(b"\x00", b"\xff", b'"', b",", b"\n", b"\r", b"[[[[", b"{", b"}", b"[]", b"{}", b"1.5"),
        *(b"\xe2\x80\xa8", b"2023-11-16T09:00:00+99:00", b"0001-01-01", b".inf", b"- ", b"a: b"),
        *(b"&a *a", b"!!python/name:os.system"),
    ]
)


@st.composite
def damaged(draw: st.DrawFn, texts: list[bytes]) -> bytes:
    """One of the texts with words of it replaced, cut out or doubled, or cut short."""
    data = bytearray(draw(st.sampled_from(texts)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 12))
        data[start : start + size] = draw(
            st.one_of(ODD_WORDS, st.binary(max_size=4), st.just(bytes(data[start : start + 60])))
        )
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    return bytes(data)


def is_one_sentence(read: Callable[[], Any], kind: type[Exception]) -> Any:
    try:
        return read()
    except kind as error:
        said = str(error)
    assert "\n" not in said.strip()
    assert len(said) < 600
    return None


@given(damaged([path.read_bytes() for path in sorted(SAMPLES.iterdir())]), st.booleans())
@SEVERAL
def test_a_damaged_trace(tmp_path: Path, data: bytes, packed: bool) -> None:
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(data) if packed else data)
    trace = is_one_sentence(lambda: load_trace(path, rate_rps=1.0), TraceError)
    if trace is not None:
        assert isinstance(trace, Trace)
        assert (trace.num_prompt_tokens > 0).all()
        assert (trace.num_output_tokens > 0).all()
        assert (trace.arrival_s >= 0).all()


@given(damaged([(FOLDER / "h100-llama-3.1-8b.yaml").read_bytes()]))
@SEVERAL
def test_a_damaged_hardware_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "h.yaml"
    path.write_bytes(data)
    is_one_sentence(lambda: load_hardware(path), HardwareError)


@given(damaged([(ROOT / "configs" / "latency.yaml").read_bytes()]))
@SEVERAL
def test_a_damaged_configuration(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    is_one_sentence(lambda: load(path), ConfigError)


@given(
    damaged([json.dumps(LLAMA).encode()]) | st.sampled_from(sorted(LLAMA)).flatmap(
        lambda key: st.sampled_from([0, -1, 1.5, None, "x", [], 10**400, True]).map(
            lambda value: json.dumps({**LLAMA, key: value}).encode()
        )
    )
)  # fmt: skip
@SEVERAL
def test_a_damaged_configuration_of_a_model(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    is_one_sentence(lambda: read_shape(path), ShapeError)


def _log() -> bytes:
    """The first decisions of a scheduler."""
    with tempfile.TemporaryDirectory() as folder:
        with DecisionLog(Path(folder), Config.default("latency"), dict) as log:
            spec = InstanceSpec(instance_id="instance-0", num_total_blocks=550, block_size=16)
            request = SchedulingRequest(request_id="r", num_prompt_tokens=9, client_id="c")
            log.write(0.0, InstanceJoined(spec=spec), ())
            told = DispatchRequest(request_id="r", instance_id="instance-0", reason="freeness")
            log.write(0.25, RequestArrived(request=request), (told,))
            log.write(0.5, Ticked(), ())
        return (Path(folder) / "decisions-000001.jsonl").read_bytes()


@given(damaged([_log()]))
@SEVERAL
def test_a_damaged_decision_log(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "decisions-000001.jsonl"
    path.write_bytes(data)

    def read() -> None:
        _, decisions = read_segment(path)
        list(decisions)

    is_one_sentence(read, DecisionLogError)


def test_a_damaged_archive(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress((SAMPLES / "azure_2023.csv").read_bytes() * 50))
    packed[40:60] = b"\xff" * 20
    path = tmp_path / "azure.csv.gz"
    path.write_bytes(bytes(packed))
    with pytest.raises(TraceError, match=r"damaged|cannot be read"):
        load_trace(path)


def test_an_archive_of_files_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "traces.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(SAMPLES / "azure_2023.csv")
    with pytest.raises(TraceError, match="a tar archive: unpack it and name a file of it") as error:
        load_trace(path)
    assert "\0" not in str(error.value)
    assert "\\x00" not in str(error.value)


def test_a_deeply_nested_line(tmp_path: Path) -> None:
    path = tmp_path / "nest.jsonl"
    nested = "[" * 100_000 + "]" * 100_000
    row = f'{{"timestamp": 1, "input_length": 10, "output_length": 1, "hash_ids": {nested}}}\n'
    path.write_text(row)
    with pytest.raises(TraceError, match=r"nest\.jsonl:1: not JSON that can be read"):
        load_trace(path)


def test_a_long_field_is_a_prompt_with_many_hashes(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    hashes = " ".join(str(10**18 + i) for i in range(9000))
    path.write_text(
        "arrival_s,num_prompt_tokens,num_output_tokens,prefix_hashes,hash_block_size\n"
        f"0,144000,5,{hashes},16\n"
    )
    trace = load_trace(path)
    assert trace.prefix_hashes is not None
    assert len(trace.prefix_hashes[0]) == 9000


@pytest.mark.parametrize("factor", [1e30, 1e300])
def test_absurd_lengths(factor: float) -> None:
    trace = load_trace(SAMPLES / "azure_2023.csv")
    with pytest.raises(TraceError, match="tokens; at most 1,000,000,000 are meant"):
        trace.scaled(length=factor)
