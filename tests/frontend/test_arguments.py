"""The command line of ``llumsched serve``: vLLM's, with a group of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from llumsched.access import is_loopback
from llumsched.config import DEFAULT_POLICY
from llumsched.frontend.options.arguments import UsageError, parse

SCHEDULER_CONFIGS = {
    "policy": "policy: round_robin\n",
    "parts": "parts: {dispatch: round_robin}\n",
    "params": "params: {stall_weight: 0.5}\n",
    "scheduler": "scheduler: {migration_interval_s: 0.2}\n",
    "all": "policy: latency\nscheduler: {migration_interval_s: 0.2}\nseed: 3\n",
}


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_defaults() -> None:
    args, options = parse(["some/model"])
    assert args.model == "some/model"
    assert args.host == "127.0.0.1"
    assert (options.num_instances, options.num_frontends) == (1, 1)
    assert options.config.policy == DEFAULT_POLICY
    assert options.ray_address is None
    assert options.admin_api


def test_flags_of_vllm_keep_their_meaning() -> None:
    args, _ = parse(
        ["--model=some/model", "--max-model-len", "2k", "--served-model-name", "a", "b", "--port=1"]
    )
    assert args.model == "some/model"
    assert args.max_model_len == 2000
    assert args.served_model_name == ["a", "b"]
    assert args.port == 1


def test_our_flags() -> None:
    flags = "--instances 3 --frontends 2 --policy=round_robin --ray-address auto --allow-other-vllm"
    _, options = parse(["m/m", *flags.split()])
    assert (options.num_instances, options.num_frontends) == (3, 2)
    assert options.config.policy == "round_robin"
    assert options.ray_address == "auto"


def test_limits_of_scaling_are_flags_and_go_before_the_configuration(tmp_path: Path) -> None:
    text = "scheduler: {min_instances: 2, max_instances: 6, scaling_interval_s: 0.5}\n"
    path = write(tmp_path, "scheduler.yaml", text)
    argv = ["m/m", f"--config={path}", "--instances=0", "--min-instances=0", "--max-instances=12"]
    _, options = parse(argv)
    assert options.num_instances == 0
    assert options.config.scheduler == {
        "min_instances": 0,
        "max_instances": 12,
        "scaling_interval_s": 0.5,
    }
    assert options.planned_instances == options.most_instances == 12


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--instnces", "3"], "unrecognized arguments: --instnces 3; did you mean --instances?"),
        (["--max_modl_len=2k"], "did you mean --max-model-len?"),
        (["--heartbeat", "3"], "did you mean --heartbeat-timeout?"),
        (["--admin-api=maybe"], "invalid choice: 'maybe'"),
    ],
)
def test_a_mistake_is_one_sentence_with_what_may_have_been_meant(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as refused:
        parse(["m/m", *argv])
    assert sentence in str(refused.value)
    assert str(refused.value).count("\n") == 0
    assert capsys.readouterr().err == ""


def test_a_key_of_a_file_that_is_no_flag_is_named_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "vllm.yaml", "max_model_len: 2048\nfontends: 2\n")
    with pytest.raises(UsageError) as refused:
        parse(["m/m", "--config", path])
    assert str(refused.value) == (
        f"--config {path}: there is no flag for the key 'fontends'; did you mean 'frontends'?"
    )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--instances=0"], "Add --min-instances 0 --max-instances N"),
        (["--instances=0", "--max-instances=2"], "Add --min-instances 0 --max-instances N"),
        (["--instances=0", "--min-instances=0"], "Add --min-instances 0 --max-instances N"),
        (["--instances=-2"], "a number of instances"),
        (["--min-instances=3", "--max-instances=2"], "must not be above max_instances (2)"),
        (["--max-instances=-1"], "max_instances"),
        (["--frontends=0"], "at least 1 frontend"),
        (["--policy=freenes"], "freenes"),
        (["--pipeline-parallel-size=2"], "--pipeline-parallel-size is not supported"),
        (["--headless"], "--headless is not supported"),
        (["--api-server-count=2"], "--frontends K"),
        (["--enable-auto-tool-choice"], "--tool-call-parser"),
    ],
)
def test_what_cannot_be_served_is_refused(argv: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(["m/m", *argv])
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- two kinds of --config -----------------------------------------------------------------------


@pytest.mark.parametrize("text", SCHEDULER_CONFIGS.values(), ids=SCHEDULER_CONFIGS)
@pytest.mark.parametrize("flag", ["--config={}", "--config {}"])
def test_configuration_of_the_scheduler(tmp_path: Path, text: str, flag: str) -> None:
    path = write(tmp_path, "scheduler.yaml", text)
    args, options = parse(["m/m", *flag.format(path).split(), "--port=1"])
    assert options.config != type(options.config)()
    assert args.port == 1
    assert args.model == "m/m"


@pytest.mark.parametrize("flag", ["--config={}", "--config {}"])
def test_flags_in_a_file_are_vllms(tmp_path: Path, flag: str) -> None:
    path = write(tmp_path, "flags.yaml", "port: 1234\nmax-model-len: 512\ninstances: 2\n")
    args, options = parse(["m/m", *flag.format(path).split()])
    assert (args.port, args.max_model_len, options.num_instances) == (1234, 512, 2)
    assert options.config.policy == DEFAULT_POLICY


def test_one_file_of_each_kind(tmp_path: Path) -> None:
    scheduler = write(tmp_path, "scheduler.yaml", SCHEDULER_CONFIGS["policy"])
    flags = write(tmp_path, "flags.yaml", "port: 1234\n")
    for order in ([scheduler, flags], [flags, scheduler]):
        args, options = parse(["m/m", *(word for path in order for word in ("--config", path))])
        assert args.port == 1234
        assert options.config.policy == "round_robin"


def test_two_configurations_of_the_scheduler(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{n}.yaml", SCHEDULER_CONFIGS["policy"]) for n in "ab"]
    with pytest.raises(UsageError) as refused:
        parse(["m/m", *(f"--config={path}" for path in paths)])
    assert all(path in str(refused.value) for path in paths)


def test_policy_and_configuration(tmp_path: Path) -> None:
    path = write(tmp_path, "scheduler.yaml", SCHEDULER_CONFIGS["policy"])
    with pytest.raises(UsageError, match="not both"):
        parse(["m/m", "--config", path, "--policy=latency"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("policy: [", ["not YAML"]),
        ("policy: freenes\n", ["freenes"]),
        ("scheduler: {migration_intervall_s: 1}\n", ["migration_intervall_s"]),
        ("scheduler: {migration_interval_s: -1}\n", ["migration_interval_s"]),
    ],
)
def test_mistake_in_a_configuration(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, "scheduler.yaml", text)
    with pytest.raises(UsageError) as refused:
        parse(["m/m", "--config", path])
    assert all(word in str(refused.value) for word in (path, *words)), refused.value


def test_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing.yaml: cannot be read: No such file"):
        parse(["m/m", "--config", str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--config"], "No config file specified"),
        (["--config=flags.txt"], "yaml"),
        (["--config=flags.yaml", "--config", "flags.yaml"], "More than one config file"),
    ],
)
def test_file_of_flags_that_vllm_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("flags.yaml", "flags.txt"):
        write(tmp_path, name, "port: 1234\n")
    with pytest.raises(UsageError, match=sentence):
        parse(["m/m", *argv])


# ---- who may reach the admin API -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "served"),
    [
        ([], True),
        (["--host=127.0.0.1"], True),
        (["--host=localhost"], True),
        (["--host=0.0.0.0"], False),
        (["--host=::"], False),
        (["--host=0.0.0.0", "--admin-api=on"], True),
        (["--admin-api=off"], False),
        (["--uds=/tmp/socket"], True),
    ],
)
def test_admin_api_is_for_this_machine_only(argv: list[str], served: bool) -> None:
    assert parse(["m/m", *argv])[1].admin_api is served


def test_a_name_that_does_not_resolve_is_not_loopback() -> None:
    assert not is_loopback("no-such-host.invalid")
