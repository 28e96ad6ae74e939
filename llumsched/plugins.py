"""Find policies by name, and build the parts of a bundle.

A name is an installed policy (entry-point group `llumsched.policies`) or `package.module:Class`,
which needs no installation: it is looked for in the current folder first. The kind of a policy
follows from the method it has.

Invariant: what this module hands out has been checked: it is of the kind asked for, and its
parameters are in range. It does not know YAML (`config`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llumsched.core.params import Param, ParamError, check_param, params_of
from llumsched.core.policy import PolicyBundle
from llumsched.policies import BUILT_IN

ENTRY_POINT_GROUP = "llumsched.policies"

KINDS: Mapping[str, str] = {
    "dispatch": "dispatch",
    "migration": "rebalance",
    "scaling": "scale",
    "admission": "admit",
    "victim": "choose",
    "predictor": "predict",
}
"""Part of a bundle -> the method that makes a class a policy of this kind."""


class PluginError(ValueError):
    """A policy cannot be found, loaded or built; the message names what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """An installed policy, loaded."""

    name: str
    kind: str
    """`bundle`, or a key of `KINDS`."""
    target: Callable[..., Any]
    source: str
    """The distribution it comes from, or the `module:attribute` it was named by."""

    @property
    def doc(self) -> str:
        """First paragraph of its docstring."""
        text = inspect.getdoc(self.target) or ""
        return " ".join(text.split("\n\n")[0].split())

    @property
    def params(self) -> tuple[Param, ...]:
        """Parameters of a policy; a bundle has those of its parts instead."""
        return params_of(self.target) if isinstance(self.target, type) else ()


def installed() -> tuple[Policy, ...]:
    """Every installed policy that can be loaded, sorted by kind and name (see `broken`)."""
    order = ["bundle", *KINDS]
    policies = [policy for policy in _all().values() if isinstance(policy, Policy)]
    return tuple(sorted(policies, key=lambda policy: (order.index(policy.kind), policy.name)))


def broken() -> Mapping[str, str]:
    """Names of installed policies that cannot be loaded, and why."""
    return {name: str(found) for name, found in _all().items() if isinstance(found, PluginError)}


def _all() -> dict[str, Policy | PluginError]:
    found: dict[str, Policy | PluginError] = {}
    for name in _targets():
        try:
            found[name] = find(name)
        except PluginError as error:
            found[name] = error
    return found


def find(name: str) -> Policy:
    """The policy of this name, or at `package.module:Class`.

    Raises:
        PluginError: there is none, or it cannot be loaded.
    """
    if ":" in name:
        _look_in_current_folder()
        return _load(name, name, source=name)
    targets = _targets()
    if name not in targets:
        near = difflib.get_close_matches(name, targets, n=1)
        installed_names = ", ".join(sorted(targets))
        hint = f"did you mean {near[0]!r}?" if near else f"installed: {installed_names}"
        raise PluginError(
            f"unknown policy {name!r}; {hint} "
            "(`llumsched policies` lists them; a class of your own is named package.module:Class)"
        )
    target, source = targets[name]
    return _load(name, target, source=source)


@functools.cache
def _targets() -> Mapping[str, tuple[str, str]]:
    """Name -> (`module:attribute`, distribution). A name of ours cannot be taken by others."""
    targets = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        source = entry.dist.name if entry.dist is not None else "an installed distribution"
        targets[entry.name] = (entry.value, source)
    targets.update({name: (target, "llumsched") for name, target in BUILT_IN.items()})
    return targets


def _look_in_current_folder() -> None:
    """A console script has the folder of the script on its path, not the one that it is run in."""
    folder = str(Path.cwd())
    if not sys.flags.safe_path and "" not in sys.path and folder not in sys.path:
        sys.path.insert(0, folder)


def _load(name: str, target: str, *, source: str) -> Policy:
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise PluginError(
            f"policy {name!r}: cannot import {module_name} ({error}); "
            "is its package installed, or its file in the current folder or on PYTHONPATH?"
        ) from error
    except Exception as error:
        raise PluginError(
            f"policy {name!r}: {module_name} fails when imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise PluginError(f"policy {name!r}: module {module_name} has no {attribute!r}")
    return Policy(name=name, kind=_kind(name, found), target=found, source=source)


def _kind(name: str, target: object) -> str:
    if inspect.isfunction(target):
        return "bundle"
    kinds = [kind for kind, method in KINDS.items() if callable(getattr(target, method, None))]
    if not isinstance(target, type) or len(kinds) != 1:
        methods = ", ".join(f"{method} ({kind})" for kind, method in KINDS.items())
        raise PluginError(
            f"policy {name!r} must be a class with exactly one of the methods {methods}, "
            "or a function that returns a PolicyBundle"
        )
    return kinds[0]


def make(policy: Policy, params: Mapping[str, Any]) -> Any:
    """An instance of a policy class with these parameters, the others at their defaults.

    Raises:
        PluginError: it cannot be built.
        ParamError: a parameter is unknown, of the wrong type or out of range.
    """
    return _construct(policy.name, policy.target, checked(policy.name, policy.params, params))


def checked(owner: str, described: tuple[Param, ...], params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with every value checked against its description.

    Raises:
        ParamError: a parameter is unknown, of the wrong type or out of range.
    """
    known = {param.name: param for param in described}
    for name in params:
        if name not in known:
            raise ParamError(name, unknown_name(f"parameter of {owner}", name, known))
    return {name: check_param(known[name], value) for name, value in params.items()}


def unknown_name(what: str, name: str, known: Mapping[str, object]) -> str:
    """`unknown ... 'nam'; did you mean 'name'?`, or the list of what there is."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"unknown {what}: {name!r}; did you mean {near[0]!r}?"
    return f"unknown {what}: {name!r}; there are: {', '.join(known) or 'none'}"


def _construct(name: str, target: Callable[..., Any], params: Mapping[str, Any]) -> Any:
    try:
        return target(**params)
    except ParamError:
        raise
    except Exception as error:
        raise PluginError(
            f"policy {name!r} cannot be built: {type(error).__name__}: {error}"
        ) from error


def bundle_of(name: str) -> PolicyBundle:
    """The bundle of this name; a dispatch policy makes a bundle by itself.

    Raises:
        PluginError: there is none, or it cannot be built.
    """
    policy = find(name)
    if policy.kind == "bundle":
        bundle = _construct(name, policy.target, {})
        if not isinstance(bundle, PolicyBundle):
            raise PluginError(f"policy {name!r} returned {bundle!r}, not a PolicyBundle")
        return dataclasses.replace(bundle, name=name)
    if policy.kind == "dispatch":
        return PolicyBundle(name=name, dispatch=make(policy, {}))
    raise PluginError(
        f"{name!r} is a {policy.kind} policy; name it under '{policy.kind}:', "
        "and under 'policy:' a bundle or a dispatch policy"
    )


def with_params(bundle: PolicyBundle, params: Mapping[str, Any]) -> PolicyBundle:
    """The bundle with these parameters in every part that has them."""
    current = {kind: getattr(bundle, kind) for kind in KINDS}
    described = {
        kind: {param.name: param for param in params_of(type(policy))}
        for kind, policy in current.items()
        if policy is not None
    }
    known = {name: param for names in described.values() for name, param in names.items()}
    for name in params:
        if name not in known:
            what = f"parameter of any part of {bundle.name!r}"
            raise ParamError(name, unknown_name(what, name, known))
    changes = {
        kind: _replace(current[kind], {n: v for n, v in params.items() if n in names})
        for kind, names in described.items()
        if any(name in names for name in params)
    }
    return dataclasses.replace(bundle, **changes)


def _replace(policy: Any, params: Mapping[str, Any]) -> Any:
    owner = type(policy).__qualname__
    values = checked(owner, params_of(type(policy)), params)
    return _construct(owner, functools.partial(dataclasses.replace, policy), values)


def build_part(bundle: PolicyBundle, kind: str, name: str | None, params: Mapping[str, Any]) -> Any:
    """One part of a bundle: another policy by name, or the bundle's own with other parameters.

    Raises:
        PluginError: there is no such policy, or it is of another kind.
        ParamError: a parameter is unknown, of the wrong type or out of range.
    """
    if name is not None:
        policy = find(name)
        if policy.kind != kind:
            raise PluginError(f"{name!r} is a {policy.kind} policy, not a {kind} policy")
        return make(policy, params)
    current = getattr(bundle, kind)
    if current is None:
        raise PluginError(
            f"bundle {bundle.name!r} has no {kind} policy to change; choose one with 'name:'"
        )
    return _replace(current, params) if params else current
