"""check: what it says of each image, and how the command behaves among other programs."""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PLUGIN, torchrun
from PIL import Image
from test_cli import call, covcli, read_terminal

from covcli.core.errors import CovcliError
from covcli.data import datasets
from covcli.data.decoding import decode
from covcli.data.images import adapt
from covcli.evaluation.explain import explain
from covcli.monitoring.check import CheckConfig, CheckedImage, check, checking
from covcli.monitoring.chunks import read_list
from covcli.monitoring.drift import read_status
from covcli.monitoring.results import CheckSummary
from covcli.signature import judge as judges
from covcli.signature.monitor import Monitor


def files_of(run: Path) -> list[str]:
    return ["--checkpoint", f"{run}/checkpoint.pt", "--signature",
            f"{run}/signature-mrc.safetensors"]  # fmt: skip


def config(run: Path, *images: object, **more: Any) -> CheckConfig:
    signature = run / "signature-mrc.safetensors"
    return CheckConfig(tuple(map(str, images)), run / "checkpoint.pt", signature, **more)


def pictures(folder: Path, count: int = 10, spec: str = "digits") -> list[Path]:
    """Write images of different sizes as files."""
    folder.mkdir(parents=True, exist_ok=True)
    images, paths = datasets.load(f"{spec}?split=test&limit={count}", "test"), []
    for i in range(count):
        pixels = images.batch(torch.tensor([i]), (3, 32 + i, 40))[0].permute(1, 2, 0).numpy()
        paths.append(folder / f"{i:03}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_scores_are_those_of_evaluate_and_of_the_monitor(evaluated: Path) -> None:
    table = pd.read_csv(evaluated / "scores.csv.gz")
    for name, spec in (("trusted", "digits?split=test"), ("photos?limit=200", "photos?limit=200")):
        mine = table[table["set"] == name]
        checked = pd.DataFrame(map(vars, check(config(evaluated, spec))))
        assert len(checked) == len(mine) > 64
        for column in ("predicted", "score", "p_value", "confidence", "softmax_confidence"):
            np.testing.assert_array_equal(checked[column], mine[column])
        assert (
            (checked["verdict"] == "untrusted") == mine["untrusted"].astype(bool).to_numpy()
        ).all()


def test_files_are_prepared_and_judged_as_by_the_monitor(run: Path, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "p", 6)
    monitor = Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors", max_error=0.2)
    pixels = torch.cat([adapt(decode(path), (3, 32, 32)) for path in paths])
    verdicts = monitor(pixels)
    checked = list(check(config(run, *paths, max_error=0.2)))
    assert [image.path for image in checked] == [str(path) for path in paths]
    assert [image.verdict for image in checked] == verdicts.words
    assert [image.score for image in checked] == verdicts.score.tolist()
    assert [image.class_name for image in checked] == [str(k) for k in verdicts.predicted.tolist()]
    with pytest.raises(dataclasses.FrozenInstanceError):
        checked[0].score = 0.0  # type: ignore[misc]


def test_why_names_the_points_that_an_explanation_ranks_first(run: Path) -> None:
    judge, _ = judges.load(run / "checkpoint.pt", run / "signature-mrc.safetensors")
    images = datasets.load("photos?limit=20", "test")
    told = list(check(config(run, "photos?limit=20", why=True)))
    for image, entry in zip(told, explain(judge, images, list(range(20))), strict=True):
        assert image.why is not None
        assert [p.name for p in image.why] == [p.name for p in entry.points[:3]]
        assert [p.share for p in image.why] == pytest.approx([p.share for p in entry.points[:3]])


def test_the_three_forms_say_the_same(run: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "p", 5)
    (tmp_path / "p" / 'é\n"x".png').write_bytes(b"no image")
    command = ["check", "p", "npz:p.npz", *files_of(run), "--plugin", str(PLUGIN), "--why",
               "--drift", "0.01"]  # fmt: skip
    np.savez(tmp_path / "p.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    outputs = {
        form: covcli(*command, "--format", form, cwd=tmp_path, LC_ALL="C")
        for form in ("csv", "jsonl", "json", "table")
    }
    for done in outputs.values():
        assert done.returncode == 0, done.stderr
        assert "9 images: " in done.stderr
        assert "drift: " in done.stderr
    lines = [json.loads(line) for line in outputs["jsonl"].stdout.splitlines()]
    document = json.loads(outputs["json"].stdout)
    assert document["images"] == lines
    assert document["summary"]["images"] == len(lines) == 9
    assert document["guarantee"]["alpha"] == 0.05
    rows = list(csv.DictReader(io.StringIO(outputs["csv"].stdout)))
    for row, line in zip(rows, lines, strict=True):
        assert row.keys() == line.keys()
        assert row["path"] == line["path"]
        for name in ("score", "p_value", "softmax_confidence", "log10_martingale"):
            assert (float(row[name]) if row[name] else None) == line[name]
    assert [line["path"] for line in lines[-4:]] == [
        'p/é\n"x".png',
        *(f"npz:p.npz#{i}" for i in range(3)),
    ]
    assert lines[-4]["verdict"] == "unreadable"
    assert "of no format" in lines[-4]["reason"]
    assert lines[0]["why"][0].keys() == {"name", "share"}
    shown = outputs["table"].stdout.splitlines()
    assert len(shown) == 10
    assert shown[1].endswith("%)")
    plain = covcli("check", "p/000.png", *files_of(run), "--plugin", str(PLUGIN), cwd=tmp_path)
    assert plain.stdout.splitlines()[0] == (
        "path,predicted,class_name,softmax_confidence,score,p_value,confidence,verdict,reason"
    )


def test_folders_follow_the_rules_of_data_folders(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    pictures(folder / "b", 2)
    pictures(folder / ".hidden", 1)
    pictures(folder / "@eaDir", 1)
    pictures(folder, 1)
    os.link(folder / "000.png", folder / ".000.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "b" / "up").symlink_to(folder)
    (folder / "c").symlink_to(folder / "b")
    odd = os.fsdecode(b"caf\xe9.png")
    os.link(folder / "000.png", folder / odd)
    checked = [image.path for image in check(config(run, folder))]
    names = ["000.png", "b/000.png", "b/001.png", "c/000.png", "c/001.png", "caf\\xe9.png"]
    assert checked == [f"{folder}/{name}" for name in names]
    # Named by itself, a hidden file is meant; a name of any bytes can be an argument.
    named = list(check(config(run, folder / ".000.png", folder / odd)))
    assert [image.verdict for image in named] != ["unreadable"] * 2
    assert named[1].path == f"{folder}/caf\\xe9.png"


def test_what_cannot_be_read_is_a_row(run: Path, tmp_path: Path) -> None:
    good = pictures(tmp_path / "p", 2)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    broken = [tmp_path / name for name in ("empty.png", "text.jpg", "gone.png", "pipe.png")]
    checked = list(check(config(run, good[0], *broken, good[1], why=True, drift=0.01)))
    alone = [*check(config(run, *good, drift=0.01))]
    assert [image.verdict == "unreadable" for image in checked] == [False, *[True] * 4, False]
    assert all(image.reason and image.score is None for image in checked[1:5])
    assert [checked[0].score, checked[5].score] == [image.score for image in alone]
    assert checked[5].log10_martingale == alone[1].log10_martingale  # the watch sees what is read
    table = tmp_path / "list.csv"
    table.write_text("path\np/000.png\ntext.jpg\np/001.png\n")
    listed = list(check(config(run, f"csv:{table}?first")))
    assert [image.verdict == "unreadable" for image in listed] == [False, True, False]
    assert listed[1].path == str(tmp_path / "text.jpg")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["nowhere.png"], "no such file or folder, nor a dataset"),
        (["npz:nowhere"], "no such file"),
        (["hollow"], "holds no image"),
        (["digits"], "is a path here and a dataset"),
        (["-", "-"], "named twice"),
        (["./digits", "--fail-on", "drift"], "add --drift"),
        (["./digits", "--max-share", "1"], "--max-share 1"),
        (["./digits", "--fail-on", "unreadable,untrustd"], "did you mean 'untrusted'"),
        (["./digits", "--metrics", "digits/000.png"], "exists and is no metrics of covcli"),
        (["./digits", "--metrics", "-"], "stands for no file"),
        (["./digits", "--metrics", "m", "--drift", "0.1", "--drift-state", "m"], "--drift-state"),
        (["./digits", "--data-dir", ""], "--data-dir: an empty path"),
        (["./digits", "--drift-state", "s"], "add --drift"),
        (["./digits", "--json", "--format", "csv"], "exclude each other"),
        (["./digits", "--drift", "0.01", "--drift-state", "hollow"], "is no regular file"),
    ],
)
def test_bad_usage_is_told_before_the_first_row(
    named: list[str], message: str, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hollow").mkdir()
    pictures(tmp_path / "digits", 1)
    code, out, err = call(capsys, "check", *named, *files_of(run))
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_list_is_read_by_lines_or_by_nul(run: Path, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "p", 3)
    odd = tmp_path / "p" / os.fsdecode(b"two\nlines \xff.png")
    paths[0].rename(odd)
    command = [sys.executable, "-m", "covcli", "check", "-", *files_of(run), "--format", "jsonl",
               "--plugin", str(PLUGIN)]  # fmt: skip
    lists = {
        b"%s\n\n%s" % (os.fsencode(paths[1]), os.fsencode(paths[2])): paths[1:],
        b"%s\0%s\0" % (os.fsencode(odd), os.fsencode(paths[2])): [odd, paths[2]],
        b"": [],
        b"/no/such.png\n": [Path("/no/such.png")],
    }
    for text, expected in lists.items():
        done = subprocess.run(command, input=text, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        named = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in expected]
        assert [row["path"] for row in rows] == named
        assert all((row["verdict"] == "unreadable") == ("no/such" in row["path"]) for row in rows)


def test_a_list_may_come_from_windows(run: Path, tmp_path: Path) -> None:
    first, second, odd = pictures(tmp_path / "p", 3)
    odd = odd.rename(tmp_path / "p" / "odd\r")  # such a name is possible elsewhere
    command = [sys.executable, "-m", "covcli", "check", "-", *files_of(run), "--format", "csv",
               "--plugin", str(PLUGIN)]  # fmt: skip
    text = f"\ufeff{first}\r\n\r\n{odd}\n{second}\r\n".encode()
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode(), newline="")))
    assert [row["path"] for row in rows] == [str(first), str(odd), str(second)]
    assert {row["verdict"] for row in rows} <= {"trusted", "untrusted"}
    text = str(first).encode("utf-16")
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    assert (done.returncode, b"is in UTF-16; write UTF-8" in done.stderr) == (2, True)


def test_a_name_is_one_cell_and_no_formula(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ["=cmd|' C calc'!A0", "-x", "+1", "@SUM(1)", "\tt", 'a,b"c', "cr\rforged,1,1", "n\nl"]
    (path,) = pictures(tmp_path / "p", 1)
    for name in names:
        os.link(path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capfd, "check", *files_of(run), "--format", "csv", "--", *names)
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert code == 0
    assert [Path(row["path"]) for row in rows] == [Path(name) for name in names]  # the same files
    assert not any(row["path"].startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows)
    assert len({row["score"] for row in rows}) == 1  # no cell slips into another column


def started(run: Path, *options: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "covcli", "check", "-", *files_of(run), "--format", "jsonl",
               "--plugin", str(PLUGIN), *options]  # fmt: skip
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **more,
    )  # fmt: skip


def asked(running: subprocess.Popen[str], path: Path) -> dict[str, Any]:
    """Name one image to a check at work, and wait for its answer."""
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write(f"{path}\n")
    running.stdin.flush()
    answer: dict[str, Any] = json.loads(running.stdout.readline())
    return answer


@pytest.mark.parametrize("options", [("--batch-size", "1"), ()], ids=["each line", "a pause"])
def test_a_list_is_answered_while_it_is_written(
    options: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    paths = pictures(tmp_path / "p", 3)
    with started(run, *options) as running:
        for path in paths:
            assert asked(running, path)["path"] == str(path)
        running.communicate(timeout=60)
    assert running.returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_check_keeps_what_it_has_told(
    number: signal.Signals, code: int, run: Path, tmp_path: Path
) -> None:
    paths, state = pictures(tmp_path / "p", 4), tmp_path / "state"
    options = ("--drift", "0.01", "--drift-state", str(state))
    with started(run, *options) as running:
        told = [asked(running, path) for path in paths[:3]]
        running.send_signal(number)  # it waits for the next name
        assert running.wait(timeout=30) == code
        assert running.stderr is not None
        assert running.stderr.read().splitlines()[-1].startswith(("interrupted", "terminated"))
    with started(run, *options) as running:
        told.append(asked(running, paths[3]))
        running.communicate(timeout=60)
    whole = check(config(run, *paths, drift=0.01, batch_size=1))
    assert [row["log10_martingale"] for row in told] == [row.log10_martingale for row in whole]


def test_a_reader_that_leaves_ends_the_check_though_the_list_goes_on(
    run: Path, tmp_path: Path
) -> None:
    paths = pictures(tmp_path / "p", 2)
    with started(run) as running:
        asked(running, paths[0])
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        running.stdin.write(f"{paths[1]}\n")
        running.stdin.flush()  # and it stays open
        assert running.wait(timeout=60) == 0
        assert "rror" not in running.stderr.read()


def test_a_terminal_gets_a_table(run: Path, tmp_path: Path) -> None:
    import pty

    pictures(tmp_path / "p", 2)
    leader, follower = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "covcli",
        "check",
        "p",
        *files_of(run),
        "--plugin",
        str(PLUGIN),
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=follower, stderr=subprocess.DEVNULL
    ) as done:
        os.close(follower)
        shown = read_terminal(leader).decode().splitlines()
    assert done.returncode == 0
    head = "verdict class softmax score p-value confidence path"
    assert shown[0].split() == head.split()
    assert [line.split()[-1] for line in shown[1:]] == ["p/000.png", "p/001.png"]


def test_exit_codes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    np.savez("black.npz", images=np.zeros((40, 8, 8, 3), np.uint8))
    digits = "digits?split=test&limit=100"
    plain = ["check", digits, *files_of(run), "--alpha", "0.1"]
    share = np.mean([i.verdict == "untrusted" for i in check(config(run, digits, alpha=0.1))])
    assert 0 < share < 0.5
    cases = {
        0: [[], ["--max-share", "0.5"], ["--fail-on", "unsure"], ["--fail-on", "unreadable"],
            ["--fail-on", "drift", "--drift", "0.01"],
            ["--fail-on", "untrusted", "--max-share", "0.5"]],
        1: [["--fail-on", "untrusted"], ["--max-share", str(share * 0.99)],
            ["text.jpg", "--fail-on", "unreadable"],
            ["npz:black.npz", "--fail-on", "drift", "--drift", "0.01"]],
    }  # fmt: skip
    for expected, commands in cases.items():
        for more in commands:
            code, out, err = call(capsys, *plain, *more)
            assert code == expected, more
            assert len(out.splitlines()) >= 101
            assert (" images are " in err or "drift: an alarm" in err) == bool(expected), more


def test_faults_are_shares_of_all_images() -> None:
    summary = CheckSummary(20, {"trusted": 15, "unsure": 2, "untrusted": 2, "unreadable": 1})
    assert summary.faults([], None) == []
    assert summary.faults([], 0.1) == []
    assert summary.faults([], 0.0999) == ["2 of 20 images are untrusted, more than 0.0999"]
    both = summary.faults(["untrusted", "unreadable"], 0.1)
    assert both == ["3 of 20 images are untrusted or unreadable, more than 0.1"]
    with pytest.raises(CovcliError, match="not watched"):
        summary.faults(["drift"], None)


def test_ranks_print_what_one_process_prints(run: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "p", 13)
    (tmp_path / "p" / "zz.png").write_text("no image")
    np.savez(tmp_path / "a.npz", images=np.zeros((7, 8, 8, 3), np.uint8))
    outputs = []
    for ranks in (1, 3):
        state = tmp_path / f"state-{ranks}"
        done = torchrun(
            ranks, "check", tmp_path / "p", f"npz:{tmp_path}/a.npz", "digits?split=test&limit=30",
            *files_of(run), "--batch-size", "4", "--threads", "1", "--drift", "0.01",
            "--drift-state", state, "--format", "jsonl", "--fail-on", "unreadable",
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        outputs.append((done.stdout, done.stderr.count("51 images: "), state.read_bytes()))
    assert len(outputs[0][0].splitlines()) == 51
    assert outputs[0][:2] == outputs[1][:2]
    assert outputs[0][1] == 1


def test_metrics_are_prometheus_text(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    odd = tmp_path / 'a "b" \\'
    run.rename(odd)
    path = tmp_path / "covcli.prom"
    code, out, _ = call(
        capsys, "check", "digits?split=test", "photos?limit=9", *files_of(odd), "--drift", "0.01",
        "--metrics", str(path), "--format", "jsonl",
    )  # fmt: skip
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    families = {f.name: f for f in text_string_to_metric_families(path.read_text())}
    samples = {
        (s.name, s.labels.get("verdict") or s.labels.get("quantile")): s.value
        for family in families.values() for s in family.samples
    }  # fmt: skip
    mine = {"signature": str(odd / "signature-mrc.safetensors"), "file": "covcli.prom"}
    assert all(mine.items() <= s.labels.items()
               for family in families.values() for s in family.samples)  # fmt: skip
    for verdict in ("trusted", "untrusted", "unreadable"):
        count = sum(row["verdict"] == verdict for row in rows)
        assert samples["covcli_check_images", verdict] == count
    p_values = [row["p_value"] for row in rows]
    for share in ("0.05", "0.5", "0.95"):
        expected = np.quantile(p_values, float(share), method="inverted_cdf")
        assert samples["covcli_check_p_value", share] == expected
    assert samples["covcli_drift_log10_martingale", None] == rows[-1]["log10_martingale"]
    assert samples["covcli_drift_images", None] == len(rows)


def test_the_state_goes_on_from_call_to_call_and_refuses_another_bound(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(tmp_path / "state")
    martingale = []
    for part in ("digits?split=test&limit=64", "digits?split=test&offset=64&limit=64"):
        more = {"drift": 0.01, "drift_state": state}
        martingale += [image.log10_martingale for image in check(config(run, part, **more))]
    whole = check(config(run, "digits?split=test&limit=128", drift=0.01))
    assert martingale == [image.log10_martingale for image in whole]
    code, _, err = call(
        capsys, "check", "digits", *files_of(run), "--drift", "0.05", "--drift-state", state
    )
    assert code == 2
    assert "watches with --drift 0.01" in err


def test_a_caller_that_stops_early_keeps_what_was_handed_out(run: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    more: dict[str, Any] = {"drift": 0.01, "drift_state": state, "batch_size": 4}
    images = check(config(run, "digits?split=test&limit=40", **more))
    first: list[CheckedImage] = [next(images) for _ in range(8)]
    images.close()  # type: ignore[attr-defined]
    rest = list(check(config(run, "digits?split=test&offset=8&limit=32", **more)))
    whole = check(config(run, "digits?split=test&limit=40", drift=0.01, batch_size=4))
    values = [image.log10_martingale for image in whole]
    assert [image.log10_martingale for image in [*first, *rest]] == values


def test_a_check_that_is_killed_or_fails_keeps_what_it_has_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, seen = tmp_path / "state", []
    some = config(run, "digits?split=test", drift=0.01, drift_state=state, batch_size=4)

    def one_that_fails() -> None:
        with checking(some) as job:
            for number, _images in enumerate(job.batches()):
                seen.append(read_status(state).images if state.exists() else None)
                if number == 3:
                    raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        one_that_fails()
    assert seen == [None] * 4  # no 15 seconds have passed
    assert read_status(state).images == 16
    monkeypatch.setattr("covcli.monitoring.check.REFRESH_SECONDS", 0.0)
    with pytest.raises(OSError, match="disk is full"):
        one_that_fails()
    # What a kill would leave: the images of the batches before, whose rows are written.
    assert seen[4:] == [16, 20, 24, 28]
    assert read_status(state).images == 32
    empty = config(run, "digits?limit=9", drift=0.01, drift_state=tmp_path / "none")
    with pytest.raises(OSError, match="before"), checking(empty):
        raise OSError("before the first image")
    assert not (tmp_path / "none").exists()


def test_a_list_whose_name_never_ends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"x.png\n" + b"x" * (3 << 20))
    with (tmp_path / "list").open("rb") as file:
        names = read_list(file.fileno())
        assert next(name for name in names if name) == "x.png"
        with pytest.raises(CovcliError, match="longer than a megabyte"):
            list(names)
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) < 2 << 20  # the rest is not read
