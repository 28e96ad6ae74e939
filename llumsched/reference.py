"""Reference of the configuration, written out from the code: YAML with every default, and text.

Invariant: the YAML of a bundle is a valid configuration that changes nothing. This module holds no
defaults and no descriptions of its own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from llumsched import plugins
from llumsched.config import NO_POLICY, Config, build_bundle
from llumsched.core.params import Param, params_of

WIDTH = 100


def yaml_of(config: Config) -> str:
    """The whole configuration in force, each parameter with its doc and range above it."""
    bundle = build_bundle(config)
    policy = plugins.find(config.policy)
    lines = [
        *_comment(policy.doc, 0),
        "# Every key at the value in force; a file needs only what it changes.",
        f"policy: {_scalar(config.policy)}",
        f"seed: {config.seed}",
        "parts:",
    ]
    for kind in plugins.KINDS:
        part = getattr(bundle, kind)
        if part is None:
            lines.append(f"  {kind}: {NO_POLICY}")
            continue
        cls = type(part)
        name = _name_of(cls)
        lines.append(f"  {kind}:")
        lines += _comment(_doc(name), 4)
        lines.append(f"    name: {_scalar(name)}")
        for param in params_of(cls):
            lines += _param(param, getattr(part, param.name), 4)
    for section, options in (
        ("scheduler", bundle.options),
        ("migration", config.migration_options),
        ("transfer", config.transfer_options),
    ):
        lines.append(f"{section}:")
        for param in params_of(type(options)):
            lines += _param(param, getattr(options, param.name), 2)
    return "\n".join(lines) + "\n"


def text_of(policy: plugins.Policy) -> str:
    """One policy with its parameters, for a terminal."""
    lines = [f"{policy.name}  ({policy.kind}, from {policy.source})"]
    lines += textwrap.wrap(policy.doc, WIDTH, initial_indent="    ", subsequent_indent="    ")
    if policy.kind == "bundle":
        lines.append(f"      parts: {_parts_of(policy.name)}")
    for param in policy.params:
        allowed = param.spec.range_text()
        default = "(required)" if param.is_required else f"= {_scalar(param.default)}"
        head = f"{param.name}: {param.type_name} {default}"
        lines.append(f"      {head}" + (f"   [{allowed}]" if allowed else ""))
        lines += textwrap.wrap(
            param.spec.doc, WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 10
        )
    return "\n".join(lines)


def _parts_of(name: str) -> str:
    """The kinds of parts that a bundle has, each with its policy."""
    bundle = plugins.bundle_of(name)
    parts = {kind: getattr(bundle, kind) for kind in plugins.KINDS}
    return ", ".join(
        f"{kind} {_name_of(type(part))}" for kind, part in parts.items() if part is not None
    )


def _name_of(cls: type) -> str:
    """How a configuration file names the class of a part."""
    for policy in plugins.installed():
        if policy.target is cls:
            return policy.name
    return f"{cls.__module__}:{cls.__qualname__}"


def _doc(name: str) -> str:
    return plugins.find(name).doc


def _param(param: Param, value: Any, indent: int) -> Iterator[str]:
    allowed = param.spec.range_text()
    doc = param.spec.doc + (f" ({allowed})" if allowed else "")
    yield from _comment(doc, indent)
    yield f"{' ' * indent}{param.name}: {_scalar(value)}"


def _comment(text: str, indent: int) -> list[str]:
    prefix = " " * indent + "# "
    return textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix)


def _scalar(value: object) -> str:
    """A value as YAML writes it. YAML reads `1e-05` as a string, so floats keep their point."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = repr(value)
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    if isinstance(value, str) and not value.replace("_", "").replace(".", "").isalnum():
        return f'"{value}"'
    return str(value)
