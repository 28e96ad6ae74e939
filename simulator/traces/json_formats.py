"""JSON traces: Mooncake, Qwen-Bailian, ShareGPT conversations, and our own JSON lines.

Mooncake and Qwen-Bailian name the blocks of each prompt: equal ids are equal prefixes, so they
become the prefix hashes of the trace. The last block of a prompt may be partial there, and a
partial block is never shared: it is left out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from llumsched.simulator.traces.reader import Columns, Format, ReadOptions, Source

BAILIAN_BLOCK_SIZE = 16
# Mooncake's files do not state their block size; re-published ones use other sizes than its own.
_BLOCK_SIZES = (512, 16, 32, 64, 128, 256, 1024)
_CHARACTERS_PER_TOKEN = 4.0
_MS = 1e-3


def read_mooncake(source: Source, options: ReadOptions) -> Columns:
    """`timestamp` (ms), `input_length`, `output_length`, `hash_ids`."""
    columns = Columns(prefix_hashes=[])
    last = 1
    for line, row in source.json_lines():
        last = line
        _read_lengths(source, line, row, columns, tick_s=_MS)
        if options.is_enough(columns):
            break
    _keep_full_blocks(source, last, columns, options.hash_block_size)
    return columns


def read_bailian(source: Source, options: ReadOptions) -> Columns:
    """`timestamp` (s), `input_length`, `output_length`, `hash_ids`; a client is a conversation."""
    columns = Columns(prefix_hashes=[], client_ids=[])
    conversation: dict[str, str] = {}
    last = 1
    for line, row in source.json_lines():
        last = line
        chat, parent = str(row.get("chat_id")), str(row.get("parent_chat_id"))
        conversation[chat] = conversation.get(parent, chat)
        if _read_lengths(source, line, row, columns, tick_s=1.0):
            assert columns.client_ids is not None
            columns.client_ids.append(conversation[chat])
        if options.is_enough(columns):
            break
    _keep_full_blocks(source, last, columns, options.hash_block_size or BAILIAN_BLOCK_SIZE)
    return columns


def read_own_jsonl(source: Source, options: ReadOptions) -> Columns:
    """The fields of our own CSV, one object a line; `prefix_hashes` is a list."""
    columns = Columns()
    first: Mapping[str, Any] = {}
    for line, row in source.json_lines():
        if not first:
            first = row
            _add_optional(columns, row)
        num_prompt_tokens = source.length(line, row, "num_prompt_tokens")
        num_output_tokens = source.length(line, row, "num_output_tokens")
        if not columns.is_request(num_prompt_tokens, num_output_tokens):
            continue
        columns.num_prompt_tokens.append(num_prompt_tokens)
        columns.num_output_tokens.append(num_output_tokens)
        if columns.arrival_s is not None:
            columns.arrival_s.append(source.seconds(line, row, "arrival_s"))
        for key in ("predicted_output_tokens", "scheduling_priority", "execution_priority"):
            values = getattr(columns, key)
            if values is not None:
                values.append(source.whole(line, row, key))
        if columns.client_ids is not None:
            columns.client_ids.append(str(row.get("client_id")))
        if columns.prefix_hashes is not None:
            columns.hash_block_size = source.whole(line, row, "hash_block_size", at_least=1)
            columns.prefix_hashes.append(_hashes(source, line, row, "prefix_hashes"))
        if options.is_enough(columns):
            break
    return columns


def read_sharegpt(source: Source, options: ReadOptions, *, skips_system: bool = False) -> Columns:
    """A JSON list of conversations; as in vLLM's benchmark, the first two turns are a request.

    A system turn at the beginning is one of the two, unless it is skipped.
    Without a tokenizer, lengths are estimated from characters, and the notes say so.
    """
    try:
        conversations = json.load(source.file)
    except json.JSONDecodeError as error:
        raise source.error(error.lineno, f"not JSON: {error.msg}") from error
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise source.error(1, f"not JSON that can be read: {error}") from error
    if not isinstance(conversations, list):
        raise source.error(1, "ShareGPT is a JSON list of conversations")
    count = options.count_tokens or _estimate_tokens
    columns = Columns(arrival_s=None)
    num_system = 0
    for number, conversation in enumerate(conversations, start=1):
        try:
            turns = conversation["conversations"]
            begins_with_system = bool(turns) and turns[0].get("from") == "system"
            skipped = 1 if begins_with_system and skips_system else 0
            num_system += begins_with_system
            num_tokens = [count(turn["value"]) for turn in turns[skipped : skipped + 2]]
        except (TypeError, LookupError, AttributeError) as error:
            raise source.error(
                1,
                f"conversation {number} is not of the form"
                ' {"conversations": [{"from": ..., "value": ...}, ...]}',
            ) from error
        if not columns.is_request(*[*num_tokens, 0, 0][:2]):
            continue
        columns.num_prompt_tokens.append(num_tokens[0])
        columns.num_output_tokens.append(num_tokens[1])
        if options.is_enough(columns):
            break
    if num_system:
        columns.notes.append(
            f"{num_system} conversations begin with a system turn, which is"
            + (
                " left out (--format sharegpt takes it for the prompt, as vLLM's benchmark does)"
                if skips_system
                else " taken for the prompt, as in vLLM's benchmark (--format sharegpt-chat leaves"
                " it out)"
            )
        )
    if options.count_tokens is None:
        columns.notes.append(
            f"token counts estimated as characters / {_CHARACTERS_PER_TOKEN:g}: no tokenizer given"
        )
    return columns


def _estimate_tokens(text: str) -> int:
    return round(len(text) / _CHARACTERS_PER_TOKEN + 0.5) if text else 0


def _read_lengths(
    source: Source, line: int, row: Mapping[str, Any], columns: Columns, *, tick_s: float
) -> bool:
    """True if the row is a request, which is then added; one without hash ids shares nothing."""
    num_prompt_tokens = source.length(line, row, "input_length")
    num_output_tokens = source.length(line, row, "output_length")
    if not columns.is_request(num_prompt_tokens, num_output_tokens):
        return False
    assert columns.arrival_s is not None
    assert columns.prefix_hashes is not None
    columns.arrival_s.append(source.seconds(line, row, "timestamp") * tick_s)
    has_hashes = row.get("hash_ids") is not None
    columns.prefix_hashes.append(_hashes(source, line, row, "hash_ids") if has_hashes else [])
    columns.num_prompt_tokens.append(num_prompt_tokens)
    columns.num_output_tokens.append(num_output_tokens)
    return True


def _hashes(source: Source, line: int, row: Mapping[str, Any], key: str) -> list[int]:
    hashes = row.get(key)
    if not isinstance(hashes, list) or not all(type(value) is int for value in hashes):
        raise source.error(line, f"{key!r} must be a list of whole numbers, not {hashes!r:.60}")
    return hashes


def _keep_full_blocks(
    source: Source, last_line: int, columns: Columns, block_size: int | None
) -> None:
    """Cut the ids of partial blocks, with the block size that fits every prompt."""
    assert columns.prefix_hashes is not None
    rows = list(zip(columns.num_prompt_tokens, columns.prefix_hashes, strict=True))
    num_without = sum(not ids for _, ids in rows)
    if num_without == len(rows):
        columns.prefix_hashes = None
        if num_without:
            columns.notes.append("no hash ids in the file: no prompt shares a prefix with another")
        return
    if num_without:
        columns.notes.append(f"rows without hash ids, which share no prefix: {num_without:,}")

    def fits(size: int) -> bool:
        return all(num // size <= len(ids) <= -(-num // size) for num, ids in rows if ids)

    sizes = _BLOCK_SIZES if block_size is None else (block_size,)
    fitting = next((size for size in sizes if fits(size)), None)
    if fitting is None:
        tried = " or ".join(map(str, sizes))
        raise source.error(
            last_line,
            f"the number of hash ids of the prompts up to here fits no block of {tried} tokens:"
            " give the hash block size of this file",
        )
    columns.hash_block_size = fitting
    columns.prefix_hashes = [ids[: num // fitting] for num, ids in rows]


def _add_optional(columns: Columns, first: Mapping[str, Any]) -> None:
    """The optional columns are those of the first row."""
    if "arrival_s" not in first:
        columns.arrival_s = None
    for key, name in (
        ("client_id", "client_ids"),
        ("predicted_output_tokens", "predicted_output_tokens"),
        ("scheduling_priority", "scheduling_priority"),
        ("execution_priority", "execution_priority"),
        ("prefix_hashes", "prefix_hashes"),
    ):
        if key in first:
            setattr(columns, name, [])


def _first_object_has(start: str, keys: set[str]) -> bool:
    """True if the first line is an object with these keys.

    The start of a file may cut even its first line short: hash ids are long.
    """
    line = start.lstrip().partition("\n")[0]
    return line.startswith("{") and all(f'"{key}"' in line for key in keys)


def _is_sharegpt(start: str) -> bool:
    return start.lstrip().startswith("[") and '"conversations"' in start


JSON_FORMATS = (
    Format(
        name="llumsched-jsonl",
        summary="our own JSON lines: the columns of llumsched-csv as keys",
        matches=lambda start: _first_object_has(start, {"num_prompt_tokens", "num_output_tokens"}),
        read=read_own_jsonl,
    ),
    Format(
        name="bailian",
        summary="Qwen-Bailian: chat_id, parent_chat_id, timestamp (s), lengths, hash_ids",
        matches=lambda start: _first_object_has(start, {"chat_id", "input_length"}),
        read=read_bailian,
    ),
    Format(
        name="mooncake",
        summary="Mooncake: timestamp (ms), input_length, output_length, hash_ids",
        matches=lambda start: _first_object_has(start, {"timestamp", "input_length"}),
        read=read_mooncake,
        spreads=True,
    ),
    Format(
        name="sharegpt",
        summary="ShareGPT JSON: a list of conversations (no arrivals)",
        matches=_is_sharegpt,
        read=read_sharegpt,
    ),
    Format(
        name="sharegpt-chat",
        summary="the same without system turns; only where it is named",
        matches=lambda start: False,
        read=functools.partial(read_sharegpt, skips_system=True),
    ),
)
