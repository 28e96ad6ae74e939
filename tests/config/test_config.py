"""A configuration file is right, or the error names file, line and the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llumsched.cli import main
from llumsched.config import Config, ConfigError, PartConfig, build_bundle, load, loads
from llumsched.core.options import SchedulerOptions
from llumsched.policies import BUILT_IN
from llumsched.policies.freeness import Freeness
from llumsched.policies.moving_quantile import MovingQuantile
from llumsched.policies.round_robin import RoundRobin
from llumsched.reference import yaml_of

CONFIGS = Path(__file__).parents[2] / "configs"


def test_an_empty_file_is_the_default() -> None:
    assert loads("") == loads("# nothing\n") == Config.default()


def test_a_file_selects_a_bundle_and_overrides_parts() -> None:
    config = loads(
        """
        policy: latency
        seed: 7
        parts:
          dispatch: {queue: whole}
          migration: none
          predictor: moving_quantile
          victim: {name: after_first_token}
        scheduler:
          migration_interval_s: 2
        """
    )
    assert config == Config(
        policy="latency",
        seed=7,
        parts={
            "dispatch": PartConfig(params={"queue": "whole"}),
            "migration": None,
            "predictor": PartConfig(name="moving_quantile"),
            "victim": PartConfig(name="after_first_token"),
        },
        scheduler={"migration_interval_s": 2.0},
    )
    bundle = build_bundle(config)
    assert bundle.dispatch == Freeness(queue="whole")
    assert bundle.migration is None
    assert isinstance(bundle.predictor, MovingQuantile)
    assert bundle.options == SchedulerOptions(migration_interval_s=2.0)


def test_shared_parameters_reach_every_part_that_has_them() -> None:
    bundle = build_bundle(loads("policy: disaggregated\nparams: {prefill_share: 0.25}"))
    assert bundle.dispatch.prefill_share == 0.25  # type: ignore[attr-defined]
    assert bundle.migration.prefill_share == 0.25  # type: ignore[union-attr]


def test_options_of_a_bundle_are_kept_where_the_file_says_nothing() -> None:
    bundle = build_bundle(loads("policy: disaggregated\nscheduler: {stale_after_s: 1}"))
    assert (bundle.options.migration_interval_s, bundle.options.stale_after_s) == (0.05, 1.0)


def test_a_dispatch_policy_is_a_bundle_by_itself() -> None:
    bundle = build_bundle(loads("policy: round_robin"))
    assert bundle.name == "round_robin"
    assert bundle.policies() == {"dispatch": RoundRobin()}


def test_two_bundles_share_no_state() -> None:
    config = loads("parts: {predictor: moving_quantile}")
    assert build_bundle(config).predictor is not build_bundle(config).predictor


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polcy: x", "f.yaml:1: unknown key in the configuration: 'polcy'; did you mean 'policy'?"),
        ("\npolicy: latancy", "f.yaml:2: unknown policy 'latancy'; did you mean 'latency'?"),
        ("policy: zzz", "f.yaml:1: unknown policy 'zzz'; installed: adaptive, after_first_token, "),
        ("policy: freeness_pairs", "f.yaml:1: 'freeness_pairs' is a migration policy; name it"),
        ("policy: [1]", "f.yaml:1: policy must be a name, not [1]"),
        ("policy: a.b:C", "f.yaml:1: policy 'a.b:C': cannot import a.b (No module named 'a')"),
        ("policy: latency\npolicy: slo", "f.yaml:2: 'policy' is given twice"),
        ("seed: x", "f.yaml:1: seed must be int, not 'x'"),
        ("- a", "f.yaml:1: the configuration must be a mapping"),
        ("a: b: c", "f.yaml:1: not YAML: mapping values are not allowed here"),
        ("a: !!python/object:os.x {}", "f.yaml:1: unknown key in the configuration: 'a'"),
        ("seed: !!python/object:os.x {}", "f.yaml:1: not a plain value"),
        ("1: 2", "f.yaml:1: a key must be a string, not 1"),
        ("parts:\n  dispach: x", "f.yaml:2: unknown key in parts: 'dispach'; did you mean"),
        ("parts:\n  dispatch: none", "f.yaml:2: the dispatch policy cannot be left out"),
        (
            "parts:\n  dispatch: freeness_pairs",
            "f.yaml:2: 'freeness_pairs' is a migration policy, not a dispatch policy",
        ),
        (
            "parts:\n  dispatch:\n    name: freeness\n    queu: whole",
            "f.yaml:4: unknown parameter of freeness: 'queu'; did you mean 'queue'?",
        ),
        (
            "parts:\n  dispatch:\n    queue: half\npolicy: latency",
            "f.yaml:3: queue must be one of head_of_line, whole, not 'half'",
        ),
        (
            "parts:\n  migration:\n    source_below: ten\npolicy: latency",
            "f.yaml:3: source_below must be float, not str 'ten'",
        ),
        (
            "parts:\n  migration:\n    source_below: 5\n    destination_above: 1\npolicy: latency",
            "f.yaml:4: destination_above (1) must be at least source_below (5)",
        ),
        (
            "parts:\n  admission: {x: 1}\npolicy: latency",
            "f.yaml:2: bundle 'latency' has no admission policy to change; choose one",
        ),
        (
            "scheduler:\n  stale_after_s: 0",
            "f.yaml:2: stale_after_s must be above 0, not 0.0",
        ),
        (
            "scheduler:\n  max_queued_request: 0",
            "f.yaml:2: unknown key in scheduler: 'max_queued_request'; did you mean",
        ),
        (
            "params:\n  queu: whole\npolicy: slo",
            "f.yaml:2: unknown parameter of any part of 'slo': 'queu'",
        ),
        (
            "policy: disaggregated\nparams:\n  prefill_share: 2",
            "f.yaml:3: prefill_share must be above 0, at most 1, not 2.0",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_fix(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        loads(text, "f.yaml")
    assert str(error.value).startswith(message)


def test_the_first_mistake_of_each_section_is_named() -> None:
    with pytest.raises(ConfigError) as raised:
        loads(
            "seed: x\nscheduler: {migration_interval: 1}\ntransfer: {transport: udp}\n", "my.yaml"
        )
    lines = str(raised.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["my.yaml:1", "my.yaml:2", "my.yaml:3"]


def test_a_policy_that_there_is_not_says_nothing_of_its_parts() -> None:
    with pytest.raises(ConfigError) as raised:
        loads("policy: latancy\nparts: {dispatch: {queue: whole}}\n", "my.yaml")
    assert len(str(raised.value).splitlines()) == 1


def test_several_files_are_checked_each_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong, other = (tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml"))
    right.write_text("policy: latency\n")
    wrong.write_text("polcy: latency\n")
    other.write_text("policy: round_robin\n")
    assert main(["config", "check", str(right), str(wrong), str(other)]) == 1
    shown = capsys.readouterr()
    assert "a.yaml: ok, policy 'latency'" in shown.out
    assert "c.yaml: ok, policy 'round_robin'" in shown.out
    assert "b.yaml:1" in shown.err


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"policy: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text"):
        load(tmp_path / "latin.yaml")


BUNDLES = sorted(name for name, target in BUILT_IN.items() if target.endswith(":bundle"))


@pytest.mark.parametrize("name", BUNDLES)
def test_every_bundle_ships_as_a_file_with_all_its_defaults(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    text = yaml_of(Config.default(name))
    hint = f"write it again: llumsched config show --policy {name} > configs/{name}.yaml"
    assert path.read_text(encoding="utf-8") == text, hint


@pytest.mark.parametrize("name", BUNDLES)
def test_the_whole_configuration_changes_nothing(name: str) -> None:
    shown = build_bundle(loads(yaml_of(Config.default(name))))
    default = build_bundle(Config.default(name))
    assert shown.options == default.options
    for kind, policy in default.policies().items():
        assert type(getattr(shown, kind)) is type(policy)
        if kind != "predictor":
            assert getattr(shown, kind) == policy


def test_every_number_is_written_so_that_yaml_reads_it_back() -> None:
    config = loads("scheduler: {step_prefill_token_s: 1.0e-7, drain_timeout_s: 1.0e+17}")
    assert build_bundle(loads(yaml_of(config))).options == build_bundle(config).options
