"""The configuration of the scheduler: which bundle, and which parts and parameters differ.

    policy: latency                  # a bundle, or a dispatch policy by itself
    params: {source_below: 5}        # for every part of the bundle that has the parameter
    parts:
      dispatch: {name: freeness, queue: whole}
      admission: none
    scheduler: {migration_interval_s: 0.2}
    migration: {max_stages: 4}       # how a request moves
    transfer: {transport: tcp, checksum: true}

Invariant: a `Config` names only what differs from the defaults in the code, so there is one place
for each default. What `load` returns can be built: every mistake is an error that names file, line
and the nearest valid name. A `Config` holds no policies: `build_bundle` makes new ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llumsched import plugins
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.options import SchedulerOptions
from llumsched.core.params import ParamError, check_param, params_of
from llumsched.core.policy import PolicyBundle
from llumsched.core.transfer_options import TransferOptions
from llumsched.yaml_file import PlainLoader

_T = TypeVar("_T")
DEFAULT_POLICY = "adaptive"
NO_POLICY = "none"
KEYS = ("policy", "seed", "params", "parts", "scheduler", "migration", "transfer")
"""The top-level keys of a configuration file."""


class ConfigError(ValueError):
    """A configuration file cannot be used; the message names file, line and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartConfig:
    """One part of a bundle: another policy (`name`), or other parameters for the bundle's own."""

    name: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Content of a configuration file."""

    policy: str = DEFAULT_POLICY
    seed: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    """Parameters for every part that has them: `prefill_share` is the same in two parts."""
    parts: Mapping[str, PartConfig | None] = field(default_factory=dict)
    """Part of the bundle -> what is different; None leaves the part out."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Changed `SchedulerOptions`."""
    migration: Mapping[str, Any] = field(default_factory=dict)
    """Changed `MigrationOptions`."""
    transfer: Mapping[str, Any] = field(default_factory=dict)
    """Changed `TransferOptions`."""

    @property
    def migration_options(self) -> MigrationOptions:
        """How a request moves."""
        return MigrationOptions(**self.migration)

    @property
    def transfer_options(self) -> TransferOptions:
        """How KV bytes travel."""
        return TransferOptions(**self.transfer)

    @classmethod
    def default(cls, policy: str = DEFAULT_POLICY) -> Config:
        """A bundle, or dispatch policy, as it ships."""
        return cls(policy=policy)


def load(path: str | Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    return loads(text, str(path))


def loads(text: str, source: str = "<text>") -> Config:
    """`load`, for text; `source` names it in errors.

    Raises:
        ConfigError: something in it is wrong.
    """
    try:
        root = yaml.compose(text, Loader=PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise ConfigError(f"{source}:{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{source}: not YAML: {said}") from error
    return Config() if root is None else _Reader(source).config(root)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A key of a mapping with its value, and where both stand."""

    key: str
    key_node: yaml.Node
    node: yaml.Node


class _Reader:
    """Turns YAML nodes into a `Config`; nodes rather than values, because they know their line."""

    def __init__(self, source: str) -> None:
        self._source = source

    def config(self, root: yaml.Node) -> Config:
        """The configuration; the error names the first mistake of each section."""
        entries = {e.key: e for e in self._entries(root, "the configuration", KEYS)}
        mistakes: list[ConfigError] = []

        def section(read: Callable[[], _T], instead: _T) -> _T:
            try:
                return read()
            except ConfigError as error:
                mistakes.append(error)
                return instead

        policy = section(lambda: self._policy(entries.get("policy")), "")
        shared: dict[str, _Entry] = {}
        if "params" in entries:
            shared = {e.key: e for e in self._entries(entries["params"].node, "params")}
        config = Config(
            policy=policy,
            seed=section(lambda: self._seed(entries.get("seed")), 0),
            params={name: self._value(entry.node) for name, entry in shared.items()},
            # What a part may say depends on the policy.
            parts=section(lambda: dict(self._parts(entries.get("parts"), policy)), {})
            if policy
            else {},
            scheduler=section(
                lambda: self._options(entries.get("scheduler"), SchedulerOptions), {}
            ),
            migration=section(
                lambda: self._options(entries.get("migration"), MigrationOptions), {}
            ),
            transfer=section(lambda: self._options(entries.get("transfer"), TransferOptions), {}),
        )
        if mistakes:
            raise ConfigError("\n".join(map(str, mistakes)))
        self._build(config, root, {name: entry.node for name, entry in shared.items()})
        return config

    def _policy(self, entry: _Entry | None) -> str:
        if entry is None:
            return DEFAULT_POLICY
        policy = self._string(entry)
        try:
            plugins.bundle_of(policy)
        except plugins.PluginError as error:
            raise self._error(entry.node, str(error)) from error
        return policy

    def _seed(self, entry: _Entry | None) -> int:
        if entry is None:
            return 0
        seed = self._value(entry.node)
        if type(seed) is not int:
            raise self._error(entry.node, f"seed must be int, not {seed!r}")
        return seed

    def _options(self, entry: _Entry | None, cls: type) -> dict[str, Any]:
        """The values of a section whose keys are the fields of `cls`."""
        if entry is None:
            return {}
        known = {param.name: param for param in params_of(cls)}
        values = {}
        for option in self._entries(entry.node, entry.key, tuple(known)):
            try:
                values[option.key] = check_param(known[option.key], self._value(option.node))
            except ParamError as error:
                raise self._error(option.node, str(error)) from error
        try:
            cls(**values)
        except ParamError as error:
            raise self._error(entry.node, str(error)) from error
        return values

    def _parts(self, entry: _Entry | None, policy: str) -> Iterator[tuple[str, PartConfig | None]]:
        if entry is None:
            return
        for part in self._entries(entry.node, "parts", tuple(plugins.KINDS)):
            config = self._part(part)
            if config is None and part.key == "dispatch":
                raise self._error(part.node, "the dispatch policy cannot be left out")
            one = Config(policy=policy, parts={part.key: config})
            lines = {part.key: part.node}
            if isinstance(part.node, yaml.MappingNode):
                lines |= {e.key: e.node for e in self._entries(part.node, part.key)}
            self._build(one, part.node, lines)
            yield part.key, config

    def _part(self, part: _Entry) -> PartConfig | None:
        if isinstance(part.node, yaml.MappingNode):
            params = {e.key: e for e in self._entries(part.node, part.key)}
            name_entry = params.pop("name", None)
            name = None if name_entry is None else self._string(name_entry)
            return PartConfig(
                name=name, params={key: self._value(e.node) for key, e in params.items()}
            )
        name = self._string(part)
        return None if name == NO_POLICY else PartConfig(name=name)

    def _build(
        self, config: Config, node: yaml.Node, lines: Mapping[str, yaml.Node] | None = None
    ) -> None:
        """Building is the check; an error is put on the line of what it names."""
        try:
            build_bundle(config)
        except ParamError as error:
            raise self._error((lines or {}).get(error.name, node), str(error)) from error
        except plugins.PluginError as error:
            raise self._error((lines or {}).get("name", node), str(error)) from error

    def _entries(
        self, node: yaml.Node, owner: str, known: tuple[str, ...] | None = None
    ) -> Iterator[_Entry]:
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{owner} must be a mapping (key: value)")
        seen = set()
        for key_node, value_node in node.value:
            key = self._value(key_node)
            if not isinstance(key, str):
                raise self._error(key_node, f"a key must be a string, not {key!r}")
            if key in seen:
                raise self._error(key_node, f"{key!r} is given twice")
            if known is not None and key not in known:
                what = f"key in {owner}"
                message = plugins.unknown_name(what, key, dict.fromkeys(known))
                raise self._error(key_node, message)
            seen.add(key)
            yield _Entry(key=key, key_node=key_node, node=value_node)

    def _string(self, entry: _Entry) -> str:
        value = self._value(entry.node)
        if not isinstance(value, str):
            raise self._error(entry.node, f"{entry.key} must be a name, not {value!r}")
        return value

    def _value(self, node: yaml.Node) -> Any:
        loader = PlainLoader("")
        try:
            return loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            raise self._error(node, f"not a plain value: {error}") from error

    def _error(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self._source}:{node.start_mark.line + 1}: {message}")


def build_bundle(config: Config) -> PolicyBundle:
    """New policies as the configuration describes them; state is never shared between two.

    Raises:
        PluginError: a policy cannot be found or built.
        ParamError: a parameter is unknown, of the wrong type or out of range.
    """
    bundle = plugins.bundle_of(config.policy)
    parts: dict[str, Any] = {}
    for kind, part in config.parts.items():
        parts[kind] = (
            None if part is None else plugins.build_part(bundle, kind, part.name, part.params)
        )
    bundle = plugins.with_params(dataclasses.replace(bundle, **parts), config.params)
    options = plugins.checked("scheduler", params_of(type(bundle.options)), config.scheduler)
    return dataclasses.replace(bundle, options=dataclasses.replace(bundle.options, **options))
