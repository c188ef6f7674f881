"""Defaults from a file and the environment: precedence, errors, and what needs the user's word."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import typer
from test_cli import call

from covcli.cli import app
from covcli.commands import configuration
from covcli.commands.configuration import load, needs_word, shown
from covcli.commands.expand import options_of
from covcli.core.errors import CovcliError

GROUP: Any = typer.main.get_command(app)
COMMANDS = {name: options_of(command) for name, command in GROUP.commands.items()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(capsys: pytest.CaptureFixture[str], command: str, option: str) -> tuple[object, str]:
    code, out, _ = call(capsys, "config", command, "--json")
    assert code == 0
    entries = {entry["option"]: entry for entry in json.loads(out)["settings"]}
    return entries[option]["value"], entries[option]["source"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `evaluate` is told: it refuses before any work."""
    seen: list[Any] = []

    def evaluate(config: Any, *_: object) -> None:
        seen.append(config)
        raise CovcliError("enough")

    monkeypatch.setattr("covcli.evaluation.evaluate.evaluate", evaluate)
    return seen


def test_option_before_environment_before_file_before_default(
    here: Path, told: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(*more: str) -> tuple[int, float | None]:
        call(capsys, "evaluate", "-u", "digits", *more)
        return told[-1].seed, told[-1].alpha

    assert value() == (0, None)
    (here / "covcli.toml").write_text("seed = 1\nalpha = 0.1\n[evaluate]\nalpha = 0.2\n")
    assert value() == (1, 0.2)
    assert source(capsys, "evaluate", "alpha") == (0.2, "covcli.toml")
    assert source(capsys, "build-signature", "alpha") == (0.1, "covcli.toml")
    monkeypatch.setenv("COVCLI_ALPHA", "0.3")
    monkeypatch.setenv("COVCLI_SEED", "2")
    assert value() == (2, 0.3)
    monkeypatch.setenv("COVCLI_EVALUATE_ALPHA", "0.4")
    assert value() == (2, 0.4)
    assert source(capsys, "evaluate", "alpha") == (0.4, "COVCLI_EVALUATE_ALPHA")
    assert source(capsys, "build-signature", "alpha") == (0.3, "COVCLI_ALPHA")
    assert value("-a", "0.5", "--seed", "3") == (3, 0.5)


def test_a_file_sets_lists_flags_and_gates_of_every_command(
    here: Path, told: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "pyproject.toml").write_text(
        '[tool.covcli]\nseed = 5\n[tool.covcli.evaluate]\nuntrusted = ["mnist", "svhn"]\n'
        'baseline = "energy"\nquiet = true\n[[tool.covcli.gates]]\nmetric = "auroc.low"\n'
        'set = "mnist"\nfail-under = 0.95\n[[tool.covcli.gates]]\nmetric = "fpr95"\nfail_over = 0\n'
    )
    call(capsys, "evaluate", "--fail-under", "accuracy=0.5")
    assert told[0].untrusted == ("mnist", "svhn")
    assert (told[0].baselines, told[0].seed) == (("energy",), 5)
    gates = [(g.metric, g.statistic, g.value, g.name) for g in told[0].gates]
    assert gates == [
        ("accuracy", "value", 0.5, None), ("auroc", "low", 0.95, "mnist"),
        ("fpr95", "value", 0.0, None),
    ]  # fmt: skip
    call(capsys, "evaluate", "-u", "digits")
    assert told[1].untrusted == ("digits",)  # an option takes the place of the whole list


def test_a_bad_gate_of_a_file_names_the_file(
    here: Path, told: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "covcli.toml").write_text('[[gates]]\nmetric = "auc"\nfail_under = 0.9\n')
    code, _, err = call(capsys, "evaluate", "-u", "digits")
    assert (code, told) == (2, [])
    assert err.startswith("error: covcli.toml: --fail-under auc=0.9: unknown metric 'auc'; did you")


def test_every_option_can_be_set_and_is_shown(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `config` prints is a file that sets the same, for every option that has a default."""
    code, out, _ = call(capsys, "config")
    assert code == 0
    for command, options in COMMANDS.items():
        assert f"\n[{command}]\n" in out
        for name in options:
            assert f"\n{name} = " in out or f"\n# {name} = " in out
    (here / "covcli.toml").write_text(out)
    loaded = load(COMMANDS)
    for command, values in loaded.values.items():
        for option in GROUP.commands[command].params:
            if option.name in values:
                assert values[option.name] == option.default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed = 3", "sed is no command or option; did you mean 'seed'?"),
        ("[evaluat]\nalpha = 1", "evaluat is no command or option; did you mean 'evaluate'?"),
        ("[evaluate]\nalpa = 1", "evaluate.alpa is no option of evaluate; did you mean 'alpha'?"),
        ("[report]\nepochs = 1", "report.epochs is no option of report"),
        ("alpha = nan", "alpha = nan: must be less than 1"),
        ("[check]\nmax_error = inf", "check.max_error = inf: must be less than 1"),
        ("tolerance = nan", "tolerance = nan: must be less than or equal to 1"),
        ('epochs = "3"', 'epochs = "3": must be a valid integer'),
        ("epochs = true", "epochs = true: must be a valid integer"),
        ("[train]\nepochs = 0", "train.epochs = 0: must be greater than or equal to 1"),
        ("quiet = 1", "quiet = 1: must be a valid boolean"),
        ('amp = "of"', 'amp = "of": must be'),
        ("untrusted = [3]", "untrusted = [3]: must be a valid string"),
        ("seed = 2026-01-01", "seed = 2026-01-01: must be a string, a number, true, false or"),
        ("[seed]\nx = 1", "seed = {x = 1}: must be a valid integer"),
        ('[evaluate]\noutput = "~/results"', "~ is no folder of yours: write the whole path"),
        ("batch_size = 3\nbatch-size = 4", "batch-size is set twice"),
        ("train = 3", "train must be a table"),
        ("x = [", "is not TOML"),
        ("epochs = " + "9" * 6000, "is not TOML"),  # Python reads no such number
        ("epochs = 0x" + "f" * 6000, "epochs = a number of 24000 bits: must be"),
        ("gates = 3", "gates must be tables"),
        ('[[gates]]\nmetric = "auroc"', "gate 1: needs metric, and either"),
        ('[[gates]]\nmetric = "auroc"\nfail_under = "1"', 'fail-under = "1": must be a number'),
        ('[[gates]]\nmetrc = "auroc"\nfail_under = 1', "gate 1: unknown key 'metrc'"),
    ],
)
def test_what_a_file_may_not_say_is_one_line_that_names_file_and_key(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (here / "covcli.toml").write_text(text)
    code, out, err = call(capsys, "report")
    assert (code, out) == (2, "")
    assert err.startswith("error: covcli.toml: ")
    assert message in err
    assert err.count("\n") == 1
    assert call(capsys, "report", "--help")[0] == 0  # which no file can take away


def test_two_files_are_refused_and_those_of_others_left_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "pyproject.toml").write_text("[tool.other]\nsed = 3\n")
    assert load(COMMANDS).file is None
    (here / "pyproject.toml").write_text("this is no TOML")
    assert load(COMMANDS).file is None
    (here / "pyproject.toml").write_text("[tool.covcli]\nseed = 3\n")
    assert load(COMMANDS).values["train"]["seed"] == 3
    (here / "covcli.toml").write_text("")
    with pytest.raises(CovcliError, match="both hold settings; keep one"):
        load(COMMANDS)
    (here / "inner").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here / "inner")
        assert load(COMMANDS).file is None  # no folder above is searched


def test_a_file_runs_overwrites_and_leaves_the_folder_only_on_the_users_word(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "evil.py").write_text("open('pwned', 'w')")
    file = here / "covcli.toml"
    for text, reason in (
        ('plugin = ["evil.py"]', "runs code"),
        ("[list]\nplugin = 'evil.py'", "runs code"),
    ):
        file.write_text(text)
        code, out, err = call(capsys, "list", "sections")
        assert (code, out) == (2, "")
        assert reason in err
        assert "covcli config --trust" in err
        assert not (here / "pwned").exists()
    assert call(capsys, "report")[2].startswith("error: runs: no run yet")  # takes no plugin
    monkeypatch.setenv("COVCLI_PLUGIN", "")  # says nothing
    assert call(capsys, "list", "sections")[0] == 2
    assert call(capsys, "config", "--trust")[0] == 0
    assert call(capsys, "list", "sections")[0] == 0
    assert (here / "pwned").exists()
    (here / "pwned").unlink()
    file.write_text(file.read_text() + "\n")  # another file now
    assert call(capsys, "list", "sections")[0] == 2
    assert not (here / "pwned").exists()
    for text, reason in (
        ("force = true", "force = true: overwrites results"),
        ('output = "/etc/cron.d"', "reaches outside this folder"),
        ('runs = "../elsewhere"', "reaches outside this folder"),
    ):
        file.write_text(text)
        code, out, err = call(capsys, "report")
        assert (code, out) == (2, "")
        assert reason in err
    file.write_text("force = true")
    assert "no run yet" in call(capsys, "report", "--no-force")[2]


def test_images_outside_the_folder_need_a_word_wherever_they_are_named(here: Path) -> None:
    (here / "link").symlink_to("/")
    for text in (
        "folder:/home", "folder:../x", "folder:a/../../x", "folder:~/x", "folder:link",
        "folder:%2Fhome", "corrupt:fog?of=folder:/home", "csv:/x?root=y", "csv:x?root=/y",
    ):  # fmt: skip
        assert needs_word("untrusted", (text,)), text
    assert needs_word("resume", "/home/me/runs/old")
    assert needs_word("resume", "old") is None
    for text in ("mnist", "folder:photos", "noise:uniform?limit=9", "attack:pgd?eps=8/255"):
        assert needs_word("untrusted", (text,)) is None, text


def test_a_variable_that_sets_nothing_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVCLI_EPOCH", "3")
    _, _, err = call(capsys, "config")
    assert err == "warning: COVCLI_EPOCH sets no option; did you mean COVCLI_EPOCHS?\n"


def test_what_is_shown_of_the_environment_can_be_a_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVCLI_WHY", "yes")
    monkeypatch.setenv("COVCLI_FAIL_ON", "untrusted unreadable")
    _, shown_settings, _ = call(capsys, "config", "check")
    monkeypatch.delenv("COVCLI_WHY")
    monkeypatch.delenv("COVCLI_FAIL_ON")
    (here / "covcli.toml").write_text(f"\ufeff{shown_settings}")  # with the mark of some editors
    values = configuration.load(COMMANDS).values["check"]
    assert (values["why"], values["fail_on"]) == (True, ("untrusted", "unreadable"))


def test_values_are_shown_as_toml_reads_them() -> None:
    import tomllib

    for value in (True, 3, 0.25, 'a"b\\c\n\x1b\u202e', ["x", "y"], {"x": date(2026, 1, 2)}):
        assert tomllib.loads(f"value = {shown(value)}")["value"] == value
        assert shown(value).isprintable()


def test_a_pipe_in_the_place_of_the_file_does_not_block(here: Path) -> None:
    import os

    os.mkfifo(here / "covcli.toml")
    with pytest.raises(CovcliError, match=r"covcli\.toml"):
        configuration.load(COMMANDS)
