"""Every ``llumsched serve`` of the docs is one that vLLM's parser takes, with ours."""

from __future__ import annotations

import shlex

import pytest

from llumsched.frontend.options.arguments import parse
from tests.project.test_docs import PAGES, commands_of

COMMANDS = sorted(
    {c for page in PAGES for c in commands_of(page) if c.startswith("llumsched serve ")}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_understood(command: str) -> None:
    args, options = parse(shlex.split(command)[2:])
    assert args.model == "MODEL"
    assert options.config.policy
