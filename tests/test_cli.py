"""The command line, from outside: what it prints where, and how it ends."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLUGIN, hears_hang_up

from covcli import __main__ as boundary
from covcli.core import distributed
from covcli.models import checkpoint as checkpoints

TINY = ["--trusted", "digits", "--model", "tiny", "--plugin", str(PLUGIN), "--learning-rate", "0.1"]


def covcli(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "covcli", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "COLUMNS": "200", **environment},
    )  # fmt: skip


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as caught:
            boundary.main(list(arguments))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def read_terminal(leader: int) -> bytes:
    """Return all that is written to a pseudo-terminal until its last writer closes it."""
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    return shown


def test_the_stages_form_a_shell_pipeline(tmp_path: Path) -> None:
    command = f'set -e; S=$({sys.executable} -m covcli build-signature --plugin {PLUGIN} \
        "$({sys.executable} -m covcli train --quiet --epochs 4 {" ".join(TINY)})"); echo "$S"; \
        {sys.executable} -m covcli evaluate --plugin {PLUGIN} --untrusted photos?limit=50; \
        {sys.executable} -m covcli report'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("signature-ensemble.safetensors")
    assert (tmp_path / lines[0]).is_file()
    assert lines[-1].endswith("report.html")
    assert Path(tmp_path, lines[-1]).is_file()
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert "FPR95: share of trusted images flagged" in done.stdout


def test_help_and_bad_usage_need_no_torch() -> None:
    """All in one process: what one command had imported, the next would show too."""
    code = (
        "import json, sys; from covcli.__main__ import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as e: print('exit code', e.code)\n"
        "slow = {'torch', 'numpy', 'pandas', 'scipy', 'matplotlib', *sys.argv[2:]}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()"
    )
    helped = [
        [],
        ["-h"],
        ["--help"],
        ["train", "--help"],
        ["evaluate", "-h"],
        ["check", "-h"],
        ["--version"],
        ["-V"],
    ]
    wrong = [["trian"], ["train", "--epoch", "3"], ["train", "--epochs", "0"], ["evaluate"],
             ["build-signature", "ckpt.pt", "--granularity", "pixel"]]  # fmt: skip
    for commands, code_of_all, slow in ((helped, 0, ["pydantic"]), (wrong, 2, [])):
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(commands), *slow],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"exit code {code_of_all}\n") == len(commands)


@pytest.mark.parametrize("color", [{"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_json_is_one_document(run: Path, color: dict[str, str]) -> None:
    done = covcli(
        "evaluate", "--untrusted", "noise:uniform?limit=40", "--json", "--force",
        cwd=run.parent.parent, COVCLI_PLUGINS="", **color,
    )  # fmt: skip
    # The tiny model lives in a plugin: without it the checkpoint cannot be rebuilt.
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unknown model 'tiny'" in done.stderr
    assert done.stderr.rstrip().endswith("or name the --plugin that registers it")
    done = covcli(
        "evaluate", "--untrusted", "noise:uniform?limit=40", "--json", "--plugin", str(PLUGIN),
        cwd=run.parent.parent, **color,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((run / "evaluation.json").read_text())
    keys = {"schema", "provenance", "signature", "trusted", "untrusted", "points",
            "confidence_bins", "confidence_thresholds"}  # fmt: skip
    assert keys <= document.keys()


@pytest.mark.parametrize("environment", [{"FORCE_COLOR": "1"}, {"TERM": "xterm"}])
def test_every_command_prints_one_document_on_a_terminal_too(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    import pty

    def on_terminal(*arguments: str) -> dict[str, object]:
        leader, follower = pty.openpty()
        command = [sys.executable, "-m", "covcli", *arguments, "--json"]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=follower, stderr=subprocess.PIPE,
            env={**os.environ, **environment},
        ) as running:  # fmt: skip
            os.close(follower)
            shown = read_terminal(leader)
            assert running.stderr is not None
            errors = running.stderr.read()
        assert running.returncode == 0, errors
        assert b"\x1b" not in shown + errors
        assert b"\r" not in errors
        document = json.loads(shown)
        assert isinstance(document, dict)
        return document

    plugin = ["--plugin", str(PLUGIN)]
    checkpoint = on_terminal("train", *TINY, "--epochs", "4", "--quiet")["checkpoint"]
    on_terminal("build-signature", str(checkpoint), *plugin)
    on_terminal("evaluate", "--untrusted", "noise:uniform?limit=20", *plugin)
    on_terminal("report")


def test_a_forced_colour_stays_out_of_pipes_and_logs(run: Path) -> None:
    done = covcli(
        "evaluate", "--plugin", str(PLUGIN), "--untrusted", "noise:uniform?limit=20",
        cwd=run.parent.parent, FORCE_COLOR="1",
    )  # fmt: skip
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr


def test_a_gate_that_fails_exits_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        "evaluate",
        "--runs",
        str(run.parent),
        "--untrusted",
        "noise:uniform?limit=40",
        "--force",
    ]
    code, _, err = call(capsys, *common, "--fail-under", "auroc=0.5", "--quiet")
    assert (code, err) == (0, "")
    blocked = ("--junit", str(run / "checkpoint.pt" / "gates.xml"), "--quiet")
    code, out, err = call(capsys, *common, "--fail-under", "accuracy=1", *blocked)
    assert (code, "0 of 1 gates passed" in out, "gate failed: accuracy" in err) == (2, True, True)
    over = ("--fail-over", "noise:uniform?limit=40:fpr95.high=1", "--annotations", "github")
    code, _, err = call(capsys, *common, *over, "--fail-under", "accuracy.low=1")
    assert code == 1
    assert "::notice title=covcli::gate passed: fpr95.high <= 1, noise:uniform?limit=40 has" in err
    assert "::error title=covcli::gate failed: accuracy.low >= 1, digits has 0." in err
    code, out, err = call(capsys, *common, "--fail-under", "accuracy=1", "--json")
    assert code == 1
    assert "gate failed: accuracy >= 1, digits has 0." in err
    json.loads(out)


def bad_commands(run: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Commands that must fail, with a part of what they must say."""
    ckpt, sig = str(run / "checkpoint.pt"), str(run / "signature-mrc.safetensors")
    runs, text = ["--runs", str(run.parent)], tmp_path / "text"
    text.write_text("hello")
    weights = checkpoints.load(run / "checkpoint.pt").model.network.state_dict()
    torch.save({**weights, "last.bias": weights["last.bias"] * torch.nan}, tmp_path / "nan.pt")
    np.savez(tmp_path / "label.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9) + 5)
    one = np.zeros((40, 8, 8), np.uint8)
    np.savez(tmp_path / "one.npz", images=one, labels=np.zeros(40, np.int64))
    (tmp_path / "empty").mkdir()
    train = ["train", *runs, "--model", "tiny", "--trusted"]
    evaluate = ["evaluate", *runs, "--force", "--untrusted"]
    sign = ["build-signature", "--force"]
    return {
        "method": ([*train, "digits", "--method", "mcr"], "did you mean 'mrc'"),
        "dataset": ([*train, "digit"], "did you mean 'digits'"),
        "model": ([*train, "digits", "--model", "vgg91"], "did you mean 'vgg19'"),
        "watched": ([*train, "digits", "--untrusted", "mnits"], "did you mean 'mnist'"),
        "attack": ([*evaluate, "attack:pdg"], "did you mean 'pgd'"),
        "parameter": ([*evaluate, "attack:pgd?steps=0"], "steps='0' is not valid"),
        "eps": ([*evaluate, "attack:pgd?eps=8/0"], "eps='8/0' is not valid"),
        "epochs": ([*train, "digits", "--epochs", "0"], "--epochs 0: must be"),
        "number": ([*train, "digits", "--epochs", "x"], "--epochs"),
        "option": ([*train, "digits", "--epoch", "3"], "No such option"),
        "device": ([*train, "digits", "--device", "tpu7"], "--device tpu7"),
        "run exists": ([*train, "digits", "--name", "tiny"], "this run exists"),
        "no labels": ([*train, "noise:uniform"], "has no labels"),
        "missing npz": ([*train, "npz:/no/such"], "no such file"),
        "empty folder": ([*train, f"folder:{tmp_path}/empty"], "holds no image"),
        "unwritable": (["train", "--trusted", "digits", "--model", "tiny", "--runs", "/proc/none"],
                       "cannot be created"),
        "no network": ([*train, "cifar10", "--data-dir", str(tmp_path)], "could not be downloaded"),
        "plugin": ([*train, "digits", "--plugin", "/no.py"], "no such file"),
        "broken plugin": ([*train, "digits", "--plugin", str(text)], "cannot be run (NameError"),
        "no checkpoint": ([*sign, "/no.pt"], "no such file"),
        "folder as checkpoint": ([*sign, str(tmp_path)], "is no regular file"),
        "text as checkpoint": ([*sign, str(text)], "is not a PyTorch checkpoint"),
        "signature as checkpoint": ([*sign, sig], "bare state dict"),
        "nan": ([*sign, str(tmp_path / "nan.pt"), "--model", "tiny"], "hold NaN"),
        "class without images": ([*sign, ckpt, "--trusted", f"npz:{tmp_path}/one.npz"],
                                 "has no correctly"),
        "labels": ([*sign, ckpt, "--trusted", f"npz:{tmp_path}/label.npz"], "labels from 5 to 13"),
        "threshold": ([*sign, ckpt, "--confidence-threshold", "2"], "--confidence-threshold"),
        "statistics": ([*sign, ckpt, "--mean", "0.5"], "three numbers"),
        "no untrusted": (["evaluate", *runs], "--untrusted"),
        "no run": (["evaluate", "--runs", "/no", "--untrusted", "photos"], "no run yet"),
        "no signature": ([*evaluate, "photos", "--method", "src"], "holds no signature"),
        "text as signature": ([*evaluate, "photos", "--signature", str(text), "--checkpoint", ckpt],
                              "is not a covcli signature"),
        "alpha": ([*evaluate, "photos", "--alpha", "0.001"], "too few for marginal alpha"),
        "gate": ([*evaluate, "photos", "--fail-under", "auc=1"], "did you mean 'auroc'"),
        "no evaluation": (["report", str(tmp_path)], "holds no evaluation"),
        "command": (["trian"], "Did you mean 'train'"),
    }  # fmt: skip


def test_bad_input_is_one_line_and_exit_2_and_writes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)
    commands = bad_commands(run, tmp_path)
    before = contents(run.parent)
    for name, (arguments, message) in commands.items():
        code, out, err = call(capsys, *arguments)
        last = err.splitlines()[-1]
        assert (name, code, out) == (name, 2, "")
        assert message in last, (name, err)
        assert last.startswith("error: "), name
        assert "Traceback" not in err, name
        assert contents(run.parent) == before, name
    code, _, err = call(capsys, "train", "--method", "mcr", "--debug")
    assert code == 2
    assert "Traceback" in err


def contents(folder: Path) -> dict[Path, int]:
    """Return what lies in a folder, and when each file was written: a lock may come and go."""
    return {path: path.stat().st_mtime_ns * path.is_file() for path in folder.rglob("*")}


def refuse(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_an_internal_error_is_3_and_never_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("covcli.training.train.train", fail)
    code, out, err = call(capsys, "train")
    assert (code, out) == (3, "")
    assert err == "internal error: RuntimeError: two lines; run again with --debug\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        RuntimeError("could not create a primitive"),
    ],
)
def test_exhausted_memory_suggests_a_smaller_batch(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("covcli.training.train.train", fail)
    code, _, err = call(capsys, "train")
    assert code == 2
    assert err.startswith("error: memory exhausted; try a smaller --batch-size")


def test_a_closed_stdout_is_no_error(run: Path) -> None:
    command = f"{sys.executable} -m covcli evaluate --plugin {PLUGIN} --force --untrusted \
        'noise:uniform?limit=20' >&-"
    done = subprocess.run(
        ["bash", "-c", command], cwd=run.parent.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "hung up"),
    ],
)
def test_an_interrupted_training_says_so_and_can_be_resumed(
    tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    command = [sys.executable, "-m", "covcli", "train", *TINY, "--epochs", "1000"]
    running = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=hears_hang_up
    )
    assert running.stderr is not None
    assert running.stderr.readline().startswith("epoch 1/1000")
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert err.splitlines()[-1] == f"{word}; go on with `covcli train --resume`"
    assert [path.name for path in (tmp_path / "runs" / "latest").iterdir()] == ["last.pt"]


def test_a_reader_that_leaves_early_is_no_error(run: Path) -> None:
    command = f"{sys.executable} -m covcli evaluate --plugin {PLUGIN} --force --untrusted \
        'noise:uniform?limit=20' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=run.parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Broken" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_a_terminal_gets_a_bar_and_a_log_gets_lines(tmp_path: Path) -> None:
    import pty

    command = [sys.executable, "-m", "covcli", "train", *TINY, "--epochs", "2"]
    leader, follower = pty.openpty()
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=follower,
        env={**os.environ, "TERM": "xterm"},
    ) as running:  # fmt: skip
        os.close(follower)
        shown = read_terminal(leader)
        assert running.stdout is not None
        out = running.stdout.read().decode()
    assert running.returncode == 0
    assert "images/s" in shown.decode()
    assert "epoch 2/2: loss" in shown.decode()
    assert out.strip().endswith("checkpoint.pt")
    assert "\x1b" not in out


def test_bad_names_come_first_and_what_exists_last(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read, downloaded or computed for a command that has a bad name in it."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("something was read")

    for name in ("covcli.data.datasets.load", "covcli.data.datasets.reload",
                 "covcli.signature.judge.load", "covcli.models.checkpoint.load"):  # fmt: skip
        monkeypatch.setattr(name, read)
    (run / "evaluation.json").write_text("{}")
    (run / "signature-src.safetensors").write_text("")
    runs, here = ["--runs", str(run.parent)], str(run / "checkpoint.pt")
    evaluate = ["evaluate", *runs, "--untrusted"]
    sign = ["build-signature", here]
    wrong = [
        ([*evaluate, "mnits"], "unknown dataset 'mnits'"),
        ([*evaluate, "attack:pdg"], "unknown attack 'pdg'"),
        ([*evaluate, "attack:pgd?step=x"], "step='x' is not valid"),
        ([*evaluate, "noise:gausian"], "unknown noise 'gausian'"),
        ([*evaluate, "corrupt:fgo?of=digits"], "unknown corruption 'fgo'"),
        ([*evaluate, "corrupt:fog?of=digts"], "unknown dataset 'digts'"),
        ([*evaluate, "digits", "--trusted", "digts"], "unknown dataset 'digts'"),
        ([*evaluate, "digits", "--method", "mcr"], "unknown method 'mcr'"),
        ([*evaluate, "digits", "--model", "vgg91"], "unknown model 'vgg91'"),
        ([*evaluate, "digits", "--baseline", "enrgy"], "unknown baseline 'enrgy'"),
        ([*evaluate, "digits", "--fail-under", "auc=1"], "unknown metric 'auc'"),
        ([*evaluate, "digits", "-c", "no.pt"], "--checkpoint no.pt: no such file"),
        ([*evaluate, "digits", "-c", here, "-s", "no"], "--signature no: no such file"),
        ([*evaluate, "digits"], "exists; pass --force"),
        ([*sign, "--method", "mcr"], "unknown method 'mcr'"),
        ([*sign, "--model", "vgg91"], "unknown model 'vgg91'"),
        ([*sign, "--trusted", "digts"], "unknown dataset 'digts'"),
        ([*sign, "--calibration", "digts"], "unknown dataset 'digts'"),
        (["train", *runs, "--name", "tiny", "--trusted", "digts"], "unknown dataset 'digts'"),
        (["train", *runs, "--name", "tiny", "--model", "vgg91"], "unknown model 'vgg91'"),
        (["train", *runs, "--name", "tiny", "--untrusted", "noise:x"], "unknown noise 'x'"),
        (["train", *runs, "--name", "tiny"], "this run exists"),
    ]
    for arguments, message in wrong:
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (2, ""), err
        assert message in err.splitlines()[-1], arguments
        assert "unknown model" not in message or "--plugin" in err


def test_a_run_ends_with_what_comes_next(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    sign = ("build-signature", "runs/tiny/checkpoint.pt", "--method", "src")
    code, out, err = call(capsys, *sign)
    assert (code, out) == (0, "runs/tiny/signature-src.safetensors\n")
    then = err.splitlines()[-1]
    assert then == f"next: covcli evaluate -s {out.strip()} -u IMAGES"
    command = then.removeprefix("next: covcli ").replace("IMAGES", "noise:uniform?limit=20")
    code, _, err = call(capsys, *command.split())
    assert code == 0
    assert err.splitlines()[-1] == "results in runs/tiny; next: covcli report runs/tiny"
    code, out, err = call(capsys, "report", "runs/tiny")
    assert (code, out) == (0, "runs/tiny/report.html\n")
    assert err.splitlines()[-1] == "next: open it in a browser"
    assert call(capsys, "report", "--quiet", "--force")[2] == ""


class TerminalStream(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("foolbox")
@pytest.mark.parametrize("width", [60, 80])
def test_no_command_cuts_a_word_or_leaves_the_width_of_the_terminal(
    run: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent.parent)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    here = "runs/tiny/checkpoint.pt"
    sets = ["-u", "noise:uniform?limit=40", "-u", "attack:pgd?limit=20&steps=3&eps=8/255"]
    train = ["train", "--trusted", "digits?limit=300", "-u", "noise:uniform?limit=40", "-m", "src"]
    for arguments in (
        ["build-signature", here, "--method", "src"],
        ["points", here],
        ["check", "digits?split=test&limit=20", "-c", here, "--why", "--format", "table"],
        ["list", "methods"],
        ["evaluate", *sets, "--explain", "1", "--fail-over", "fpr95=1"],
        ["evaluate", *sets, "--verbose", "--force"],
        ["inspect", "runs/tiny"],
        ["report", "runs/tiny"],
        [*train, "--model", "tiny", "--epochs", "3", "--name", "new"],
    ):
        monkeypatch.setattr("sys.stderr", TerminalStream())
        code, out, _ = call(capsys, *arguments)
        err = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())  # type: ignore[attr-defined]
        assert code == 0, err
        assert "…" not in out + err, arguments
        lines = [line.rstrip() for line in re.split("[\r\n]", out + err)]
        assert [line for line in lines if len(line) > width and " " in line] == [], arguments


def test_only_the_first_rank_prints_and_writes(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    files, signature = set(run.rglob("*")), f"{run}/signature-mrc.safetensors"
    for command in (
        ["list", "methods"],
        ["points", f"{run}/checkpoint.pt"],
        ["compare", signature, signature, "--output", f"{run}/changes"],
        ["export", "--signature", signature, "--format", "torch"],
    ):
        assert call(capsys, *command, "--quiet") == (0, "", ""), command
    assert set(run.rglob("*")) == files
