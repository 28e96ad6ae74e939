"""Parsing of flags: nothing is abbreviated, and a mistyped one is answered with the nearest.

An abbreviation would change its meaning, or lose it, with the next flag that is added.
"""

from __future__ import annotations

import argparse
import difflib
import urllib.parse
from collections.abc import Iterable
from typing import Any, NoReturn

UNRECOGNIZED = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """``argparse``'s, and so are its subparsers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["allow_abbrev"] = False
        super().__init__(*arguments, **options)

    def error(self, message: str) -> NoReturn:
        # What a subparser does not know is told by the parser above it.
        super().error(with_hints(message, _all_flags(self)))


def _all_flags(parser: argparse.ArgumentParser) -> set[str]:
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                flags |= _all_flags(subparser)
    return flags


def with_hints(message: str, flags: Iterable[str]) -> str:
    """``argparse``'s message, with what may have been meant by flags that it does not know."""
    if not message.startswith(UNRECOGNIZED):
        return message
    words = message.removeprefix(UNRECOGNIZED).split()
    names = [word.partition("=")[0] for word in words if word.startswith("-")]
    near = [found for name in names if (found := nearest(name, flags))]
    return message + "".join(f"; did you mean {flag}?" for flag in near)


def nearest(name: str, flags: Iterable[str]) -> str | None:
    """The only flag that begins like this, or the nearest by its letters."""
    name = name.replace("_", "-")
    known = list(flags)
    longer = [flag for flag in known if flag.startswith(name)]
    if len(longer) == 1:
        return longer[0]
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def server_url(text: str) -> str:
    """The address of a server, without the end that all its paths share; a type of `argparse`.

    Raises:
        argparse.ArgumentTypeError: the text is no address.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        # A port that is none is noticed as it is read.
        is_whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_whole = False
    if not is_whole or not text.isprintable() or " " in text:
        shown = text if text.isprintable() else ascii(text)
        raise argparse.ArgumentTypeError(
            f"{shown}: give the whole address, such as http://127.0.0.1:8000"
        )
    return text.rstrip("/").removesuffix("/v1")
