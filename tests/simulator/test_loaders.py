"""Every format is recognised and read; whatever is wrong is named with its file and line.

The samples are a few rows each, written for these tests in the form of the public data.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from llumsched.simulator.traces.loaders import FORMATS, detect_format, load_trace
from llumsched.simulator.traces.trace import Trace, TraceError

SAMPLES = Path(__file__).parent / "samples"


def rows(trace: Trace) -> list[tuple[float, int, int]]:
    """(arrival, prompt, output) of every request."""
    columns = (trace.arrival_s, trace.num_prompt_tokens, trace.num_output_tokens)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize(
    ("sample", "format_name", "expected"),
    [
        ("azure_2023.csv", "azure", [(0.0, 100, 20), (1.5, 2000, 1), (3.0, 64, 300)]),
        ("azure_2024.csv", "azure", [(0.0, 100, 20), (1.5, 200, 5)]),
        ("burstgpt_v1.csv", "burstgpt", [(0.0, 472, 18), (40.0, 1087, 230)]),
        ("burstgpt_v2.csv", "burstgpt", [(0.0, 472, 18), (0.5, 1087, 230)]),
        ("vidur.csv", "vidur", [(0.0, 10, 3), (2.0, 20, 4)]),
        ("apex.csv", "apex", [(0.0, 304, 822), (0.75, 497, 1783)]),
        ("servegen.csv", "servegen", [(0.0, 208, 792), (0.75, 17, 6)]),
        ("mooncake.jsonl", "mooncake", [(0.0, 1100, 50), (0.5, 1024, 60), (3.0, 400, 70)]),
        ("bailian.jsonl", "bailian", [(0.0, 40, 5), (0.5, 17, 6), (2.0, 64, 7)]),
        ("own.csv", "llumsched-csv", [(0.0, 17, 6), (0.5, 40, 5)]),
        ("own.jsonl", "llumsched-jsonl", [(0.0, 17, 6), (0.5, 40, 5)]),
    ],
)
def test_a_format_is_recognised_and_read(
    sample: str, format_name: str, expected: list[tuple[float, int, int]]
) -> None:
    assert detect_format(SAMPLES / sample).name == format_name
    for trace in (load_trace(SAMPLES / sample), load_trace(SAMPLES / sample, format=format_name)):
        assert np.array(rows(trace)) == pytest.approx(np.array(expected))


@pytest.mark.parametrize("sample", sorted(path.name for path in SAMPLES.iterdir()))
def test_every_sample_is_of_a_known_format(sample: str) -> None:
    assert detect_format(SAMPLES / sample).name in FORMATS


def test_rows_that_failed_are_left_out_and_counted() -> None:
    notes = load_trace(SAMPLES / "burstgpt_v1.csv").notes
    assert notes == ("rows without prompt or output tokens, left out: 1",)


def test_mooncake_ids_of_full_blocks_become_prefixes() -> None:
    trace = load_trace(SAMPLES / "mooncake.jsonl")
    assert (trace.hash_block_size, trace.prefix_hashes) == (512, ((0, 1), (0, 1), ()))


def test_the_block_size_of_mooncake_files_is_found_from_their_rows() -> None:
    trace = load_trace(SAMPLES / "mooncake_16.jsonl")
    assert (trace.hash_block_size, trace.prefix_hashes) == (16, ((0, 1), (0, 1)))


def test_a_bailian_conversation_is_one_client() -> None:
    trace = load_trace(SAMPLES / "bailian.jsonl")
    assert trace.client_ids == ("11", "12", "11")
    assert trace.prefix_hashes == ((5, 6), (8,), (5, 6, 10, 11))


@pytest.mark.parametrize("sample", ["own.csv", "own.jsonl"])
def test_our_own_formats_carry_everything(sample: str) -> None:
    trace = load_trace(SAMPLES / sample)
    assert trace.client_ids == ("bob", "ann")
    assert trace.prefix_hashes == ((3,), (1, 2))
    if sample == "own.csv":
        assert trace.scheduling_priority.tolist() == [1, 0]
        assert trace.predicted_output_tokens is not None
        assert trace.predicted_output_tokens.tolist() == [7, 6]


def test_lengths_alone_need_a_rate() -> None:
    with pytest.raises(
        TraceError, match=r"vidur_lengths.csv: it has no arrival times: give a rate"
    ):
        load_trace(SAMPLES / "vidur_lengths.csv")
    trace = load_trace(SAMPLES / "vidur_lengths.csv", rate_rps=2.0, seed=1)
    assert trace.num_prompt_tokens.tolist() == [10, 20]
    assert trace.predicted_output_tokens is not None
    assert trace.predicted_output_tokens.tolist() == [2, 9]
    assert trace.notes == ("arrivals drawn: 2 requests/s, gaps of CV 1",)


def test_sharegpt_counts_with_a_tokenizer_or_says_that_it_estimates() -> None:
    counted = load_trace(
        SAMPLES / "sharegpt.json", rate_rps=1.0, count_tokens=lambda text: len(text.split())
    )
    assert rows(counted)[0][1:] == (6, 1)
    estimated = load_trace(SAMPLES / "sharegpt.json", rate_rps=1.0)
    assert rows(estimated)[0][1:] == (7, 2)
    assert "estimated as characters / 4" in " ".join(estimated.notes)
    assert "rows without prompt or output tokens, left out: 1" in counted.notes


@pytest.mark.parametrize(
    ("format", "lengths", "said"),
    [
        ("sharegpt", (2, 3), "taken for the prompt, as in vLLM's benchmark"),
        ("sharegpt-chat", (3, 1), "left out (--format sharegpt takes it"),
    ],
)
def test_a_system_turn_in_front_is_said_and_can_be_left_out(
    format: str, lengths: tuple[int, int], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "chats.json"
    turns = [("system", "Be brief."), ("human", "How many eggs?"), ("gpt", "Two.")]
    conversation = [{"from": who, "value": text} for who, text in turns]
    path.write_text(json.dumps([{"conversations": conversation}]))
    trace = load_trace(path, format=format, rate_rps=1, count_tokens=lambda text: len(text.split()))
    assert rows(trace)[0][1:] == lengths
    assert f"1 conversations begin with a system turn, which is {said}" in trace.notes[0]


# Prompt and output of each row: a request, and what is none.
ODD_ROWS = (("5", "1"), ("5", "0"), ("", "3"), ("4", "-1"), ("6", "2"))


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("own.csv", "arrival_s,num_prompt_tokens,num_output_tokens", "{},{},{}"),
        ("vidur.csv", "arrived_at,num_prefill_tokens,num_decode_tokens", "{},{},{}"),
        ("own.jsonl", "", '{{"arrival_s":{},"num_prompt_tokens":{},"num_output_tokens":{}}}'),
        (
            "mooncake.jsonl",
            "",
            '{{"timestamp":{},"input_length":{},"output_length":{},"hash_ids":[1]}}',
        ),
    ],
)
def test_rows_that_are_no_request_are_left_out_and_counted_in_every_format(
    name: str, header: str, row: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    none = "null" if name.endswith("jsonl") else ""
    lines = [row.format(i, p or none, o) for i, (p, o) in enumerate(ODD_ROWS)]
    path.write_text("\n".join([header, *lines] if header else lines))
    trace = load_trace(path)
    assert [row[1:] for row in rows(trace)] == [(5, 1), (6, 2)]
    assert "rows without prompt or output tokens, left out: 3" in trace.notes


def test_a_file_without_hash_ids_shares_no_prefix_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "moon.jsonl"
    row = '{"timestamp": 0, "input_length": 600, "output_length": 10}\n'
    path.write_text(row * 2)
    trace = load_trace(path)
    assert trace.prefix_hashes is None
    assert "no hash ids in the file" in " ".join(trace.notes)
    path.write_text(row + row.replace("}", ', "hash_ids": [1, 2]}'))
    trace = load_trace(path)
    assert trace.prefix_hashes == ((), (1,))
    assert "rows without hash ids, which share no prefix: 1" in trace.notes


def test_a_stray_time_stamp_is_told(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(
        "Timestamp,Model,Request tokens,Response tokens\n0,x,5,1\n"
        + "".join(f"{1_700_000_000 + i},x,5,1\n" for i in range(5))
    )
    trace = load_trace(path)
    assert "19,676 days without a request lie after request 0" in " ".join(trace.notes)


def test_a_rate_scales_time() -> None:
    trace = load_trace(SAMPLES / "azure_2023.csv", rate_rps=4.0)
    assert trace.rate_rps == pytest.approx(4.0)
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.25, 0.5])


def write_rounded(path: Path) -> Path:
    lines = [
        f'{{"timestamp": {3000 * (i // 10)}, "input_length": {512 + i}, "output_length": 1,'
        f' "hash_ids": [{i}]}}'
        for i in range(100)
    ]
    path.write_text("\n".join(lines))
    return path


def test_rounded_time_stamps_are_spread_and_the_notes_say_so(tmp_path: Path) -> None:
    path = write_rounded(tmp_path / "rounded.jsonl")
    trace = load_trace(path, seed=3)
    # The first request is at 0 again, so the others move with it.
    assert len(np.unique(trace.arrival_s)) == 100
    assert trace.num_prompt_tokens.tolist() == list(range(512, 612))
    groups = (trace.arrival_s + 3.0 - trace.arrival_s[9]) // 3.0
    assert groups.max() <= 10
    assert trace.notes == (
        "time stamps are rounded to 3 s in the file; each was moved by a random part of that",
    )
    assert load_trace(path, seed=3).arrival_s.tolist() == trace.arrival_s.tolist()
    assert load_trace(path, seed=4).arrival_s.tolist() != trace.arrival_s.tolist()


def test_gzip_is_read_and_only_as_far_as_wanted(tmp_path: Path) -> None:
    path = tmp_path / "packed.jsonl.gz"
    path.write_bytes(gzip.compress((SAMPLES / "mooncake_16.jsonl").read_bytes() + b"not JSON\n"))
    assert len(load_trace(path, max_requests=2)) == 2


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n\n2023-11-16 09:00:00,1,x\n",
         r"a.csv:3: 'GeneratedTokens' must be a whole number, not 'x'"),
        ("b.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n",
         r"b.csv:2: 'TIMESTAMP' must be a date and time"),
        ("c.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 09:00:00,1\n",
         r"c.csv:2: 2 values where the header has 3"),
        ("d.csv", "arrival_s,num_prompt_tokens,num_output_tokens\n0,5,0\n",
         r"d.csv: no requests in it; rows without prompt or output tokens, left out: 1"),
        ("e.csv", "arrival_s,num_prompt_tokens,num_output_tokens\nnan,5,1\n",
         r"e.csv:2: 'arrival_s' must be a number, not 'nan'"),
        ("f.csv", "when,what\n1,2\n",
         r"f.csv:1: not the beginning of a trace: 'when,what'; it begins .* of: llumsched-csv, "),
        ("g.jsonl", '{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n{',
         r"g.jsonl:2: not JSON: "),
        ("h.jsonl", '{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": 7}\n',
         r"h.jsonl:1: 'hash_ids' must be a list of whole numbers, not 7"),
        ("i.jsonl", '{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}\n',
         r"i.jsonl:1: the number of hash ids .* give the hash block size"),
        ("j.jsonl", '{"timestamp": 1, "input_length": 5}\n',
         r"j.jsonl:1: 'output_length' is missing; this row has: timestamp, input_length"),
        ("k.json", '[{"conversations": 5}]', r"k.json:1: conversation 1 is not of the form"),
        ("l.csv", "arrival_s,num_prompt_tokens,num_output_tokens\n", r"l.csv: no requests in it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_file_and_line(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TraceError, match=said):
        load_trace(path)


def test_a_format_that_does_not_fit_or_exist_is_named() -> None:
    with pytest.raises(TraceError, match=r"vidur.csv:1: .* 'azure' .*missing here: TIMESTAMP"):
        load_trace(SAMPLES / "vidur.csv", format="azure")
    with pytest.raises(TraceError, match=r"unknown trace format: 'azur'; did you mean 'azure'"):
        load_trace(SAMPLES / "vidur.csv", format="azur")


def test_a_file_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nothing.csv: cannot be read: No such file"):
        load_trace(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("times", "columns"),
    [
        (("10", "12.5"), "arrival=when,prompt=in,output=out,client=who"),
        (
            ("2023-11-16 09:00:00", "2023-11-16 09:00:02.5"),
            "arrival = when, prompt = in, output = out, client = who",
        ),
    ],
)
def test_the_columns_of_another_file_can_be_named(
    times: tuple[str, str], columns: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.csv"
    path.write_text(f"who,out,when,in\na,5,{times[0]},100\nb,0,{times[1]},7\na,6,{times[1]},20\n")
    trace = load_trace(path, columns=columns)
    assert rows(trace) == [(0.0, 100, 5), (2.5, 20, 6)]
    assert trace.notes == ("rows without prompt or output tokens, left out: 1",)


def test_named_columns_without_arrivals_need_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("in,out\n100,5\n20,6\n")
    with pytest.raises(TraceError, match="no arrival times: give a rate"):
        load_trace(path, columns="prompt=in,output=out")
    assert len(load_trace(path, columns="prompt=in,output=out", rate_rps=2.0)) == 2


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("when,prompt=in", "columns 'when,prompt=in': 'when' must be one of arrival=COLUMN, "),
        ("prompt=in,prompt=in", "each once"),
        ("prompt=in", "say which column has the output tokens"),
        ("prompt=in,output=x", r"other.csv:1: .*missing here: x"),
    ],
)
def test_a_mistake_in_named_columns_is_named(columns: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("in,out\n100,5\n")
    with pytest.raises(TraceError, match=said):
        load_trace(path, columns=columns)
    with pytest.raises(TraceError, match="format and columns: give one of them"):
        load_trace(path, columns=columns, format="azure")
