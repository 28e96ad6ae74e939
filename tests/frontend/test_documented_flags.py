"""Every ``llumsched serve`` of the docs is one that vLLM's parser takes, with ours."""

from __future__ import annotations

import itertools
import shlex

import pytest

from llumsched.commands.serve import names_backends
from llumsched.frontend.options.arguments import parse
from llumsched.proxy.backends import parse_backend
from tests.project.test_docs import PAGES, commands_of

COMMANDS = sorted(
    {c for page in PAGES for c in commands_of(page) if c.startswith("llumsched serve ")}
)


PROXIES = [command for command in COMMANDS if names_backends(shlex.split(command))]


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {*PROXIES}))
def test_it_is_understood(command: str) -> None:
    args, options = parse(shlex.split(command)[2:])
    assert args.model == "MODEL"
    assert options.config.policy


@pytest.mark.parametrize("command", PROXIES)
def test_a_proxy_s_servers_are_understood(command: str) -> None:
    words = shlex.split(command)
    for flag, value in itertools.pairwise(words):
        if flag == "--backend":
            assert parse_backend(value).url.startswith("http")
