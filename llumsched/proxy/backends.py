"""The list of servers: from flags, or from a YAML file that may change while the proxy serves.

    backends:
      - http://10.0.0.1:8000
      - {url: "http://10.0.0.2:8000", weight: 2, role: prefill, api_key_env: SECOND_KEY}

Any other key of the file is the scheduler's configuration, as `--config` has it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llumsched import plugins
from llumsched.core.types import InstanceRole
from llumsched.flags import server_url
from llumsched.yaml_file import YamlFileError, read_yaml

FIELDS = ("url", "weight", "role", "api_key_env", "max_adapters")
SYNTAX = "URL[,weight=W][,role=mixed|prefill|decode][,api_key_env=NAME][,max_adapters=N]"


class BackendError(ValueError):
    """A list of servers cannot be used; the message names the place and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A plain server as the operator names it."""

    url: str
    weight: float = 1.0
    """Size relative to the other servers, where a server does not tell its KV cache's."""
    role: InstanceRole = InstanceRole.MIXED
    api_key_env: str | None = None
    """The environment variable with the key that this server wants instead of the client's."""

    max_adapters: int = 0
    """LoRA adapters that it may have; the one unused longest makes room. 0: no limit."""

    @property
    def api_key(self) -> str | None:
        """The key itself; `None` where the client's own is passed on."""
        return os.environ.get(self.api_key_env) if self.api_key_env else None


def parse_backend(text: str) -> Backend:
    """A server as `--backend` names it.

    Raises:
        BackendError: the text is not of the form `SYNTAX`.
    """
    url, *options = text.split(",")
    fields: dict[str, Any] = {"url": url}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise BackendError(f"--backend {text}: {option!r} is not NAME=VALUE; it is {SYNTAX}")
        fields[name.strip()] = value.strip()
    return _backend(fields, f"--backend {text}")


def read_backends(path: Path) -> tuple[tuple[Backend, ...], str]:
    """Servers of a file, and the rest of it: the scheduler's configuration as YAML.

    Raises:
        BackendError: the file cannot be read, or something in it is wrong.
    """
    try:
        content = read_yaml(path)
    except YamlFileError as error:
        raise BackendError(str(error)) from error
    if not isinstance(content, dict) or not isinstance(content.get("backends"), list):
        raise BackendError(f"{path}: it needs a key 'backends' with a list of servers")
    entries = content.pop("backends")
    backends = [
        _backend({"url": entry} if isinstance(entry, str) else entry, f"{path}: server {number}")
        for number, entry in enumerate(entries, start=1)
    ]
    return checked(backends, str(path)), yaml.safe_dump(content) if content else ""


def checked(backends: Sequence[Backend], where: str) -> tuple[Backend, ...]:
    """The servers, if each is there once.

    Raises:
        BackendError: one is named twice, or there is none.
    """
    if not backends:
        raise BackendError(f"{where}: name at least one server")
    urls = [backend.url for backend in backends]
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise BackendError(f"{where}: {twice[0]} is named twice")
    return tuple(backends)


def _backend(fields: Any, where: str) -> Backend:
    if not isinstance(fields, Mapping) or "url" not in fields:
        raise BackendError(f"{where}: a server is a URL, or a mapping with the key 'url'")
    for name in fields:
        if name not in FIELDS:
            known = dict.fromkeys(FIELDS)
            raise BackendError(f"{where}: {plugins.unknown_name('key', str(name), known)}")
    try:
        url = server_url(str(fields["url"]))
    except argparse.ArgumentTypeError as error:
        raise BackendError(f"{where}: {error}") from None
    key = fields.get("api_key_env")
    if key is not None and not os.environ.get(str(key)):
        raise BackendError(f"{where}: the environment has no variable {key}")
    return Backend(
        url=url,
        weight=_weight(fields.get("weight", 1.0), where),
        role=_role(fields.get("role", InstanceRole.MIXED), where),
        api_key_env=None if key is None else str(key),
        max_adapters=_number(fields.get("max_adapters", 0), where),
    )


def _weight(value: Any, where: str) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise BackendError(f"{where}: weight must be a number above 0, not {value!r}")
    return weight


def _number(value: Any, where: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0:
        raise BackendError(f"{where}: max_adapters must be a number from 0, not {value!r}")
    return number


def _role(value: Any, where: str) -> InstanceRole:
    try:
        return InstanceRole(value)
    except ValueError:
        known = ", ".join(InstanceRole)
        raise BackendError(f"{where}: role must be one of {known}, not {value!r}") from None
