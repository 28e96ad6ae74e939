"""Structured outputs that no answer can have, such as a schema that is only a reference to itself.

vLLM takes them, and ends the request with a 500 when no token is allowed. Here the grammar is read
as xgrammar prints it: a rule that needs itself before anything else leads nowhere. What is not
understood passes, so that nothing is refused which vLLM can answer.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.utils import grammar_is_likely_lark

LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]')
RULE = re.compile(r"^(\w+) ::= (.*)$")
PART = re.compile(r"('|\w+)(?:\{(\d+), ?-?\d+\})?")
# Stands for any text: a literal, or a class of characters.
TEXT = "'"


def refuse_what_has_no_answer(params: StructuredOutputsParams | None) -> None:
    """Refuse a schema or grammar that leads to where no token is allowed.

    Raises:
        VLLMValidationError: a 400; vLLM's own answer is a 500.
    """
    if params is None:
        return
    found = _recursive_part(params)
    if found is not None and leads_nowhere(found[1]):
        name, _ = found
        raise VLLMValidationError(
            f"{name}: no answer satisfies it, since it requires something that is defined only by"
            " itself; give the recursion an end",
            parameter=name,
        )


def leads_nowhere(grammar: str) -> bool:
    """True if no answer is possible by a grammar that xgrammar has printed.

    A rule is stuck that cannot begin without itself, and so is one that needs a stuck rule. One
    that goes on for ever is not: such an answer ends with the tokens that were asked for.
    """
    rules = {
        found[1]: _alternatives(found[2])
        for found in map(RULE.match, grammar.splitlines())
        if found is not None
    }
    sound = set(rules)
    while True:
        stuck = set(sound)
        while True:
            free = {
                name
                for name in stuck
                if any(first not in stuck and rest <= sound for first, rest in rules[name])
            }
            if not free:
                break
            stuck -= free
        if not stuck:
            return "root" in rules and "root" not in sound
        sound -= stuck


def _alternatives(body: str) -> list[tuple[str, set[str]]]:
    """Of each alternative the rule that it begins with, or nothing, and the others it needs."""
    if not body.startswith("("):
        return [("", set())]  # a tag dispatch or a regular expression
    # A look-ahead, which is (=...), is not part of the answer.
    bare = LITERAL.sub(f" {TEXT} ", body).split("(=")[0]
    found = []
    for alternative in bare.split("|"):
        parts = [name if least != "0" else TEXT for name, least in PART.findall(alternative)]
        needed = {part for part in parts[1:] if part != TEXT}
        found.append((parts[0] if parts and parts[0] != TEXT else "", needed))
    return found


def _recursive_part(params: StructuredOutputsParams) -> tuple[str, str] | None:
    """The parameter that may refer to itself, and its grammar; ``None`` if there is none.

    vLLM has looked at it before, and what it refuses it says better.
    """
    import xgrammar  # slow to import, and seldom needed

    schema: Any = params.json
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema) if schema else ""
        if "$ref" in text:
            return "json", str(xgrammar.Grammar.from_json_schema(text))
        if params.grammar and not params.choice:
            of = xgrammar.Grammar
            read = of.from_lark if grammar_is_likely_lark(params.grammar) else of.from_ebnf
            return "grammar", str(read(params.grammar))
    except Exception:  # whatever xgrammar's native code finds wrong with it
        return None
    return None
