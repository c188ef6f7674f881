"""Signals end a process soon, whatever it does, with the documented code and no traceback."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PLUGIN, hears_hang_up

import covcli
from covcli.core import files, run_folders, signals
from covcli.core.errors import CovcliError
from covcli.core.signals import Interrupted, Interrupts

WATCHED = """
import ctypes, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from covcli.core import signals

signals.PATIENCE = float(sys.argv[1])

def locked_twice():
    lock, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
    while True:
        libc.pthread_mutex_lock(lock)

def deaf_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 1000).result()

def swallowed():
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass

def alarmed():
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    time.sleep(0.2)
    try:
        while True:
            time.sleep(1000)
    except signals.Interrupted:
        time.sleep(0.3)
        print("time to end", flush=True)
        sys.exit(9)

def held():
    with interrupts.deferred():
        time.sleep(1000)
        time.sleep(1000)

with signals.watched():
    interrupts = signals.Interrupts()
    interrupts.install()
    if sys.argv[3] == "saving":
        with interrupts.saving():
            print("ready", flush=True)
            time.sleep(2)
            print("saved", flush=True)
        sys.exit(9)
    threading.Timer(0.5, print, ["ready"], {"flush": True}).start()  # once it blocks
    globals()[sys.argv[2]]()
"""


def blocked(patience: float, how: str, state: str = "") -> subprocess.Popen[str]:
    running = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(patience), how, state], preexec_fn=hears_hang_up,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    return running


@pytest.mark.parametrize("how", ["locked_twice", "deaf_thread", "swallowed", "held"])
def test_whatever_blocks_ends_after_the_patience(how: str) -> None:
    running = blocked(0.3, how)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (143, "terminated; what was not saved by then is lost\n")


@pytest.mark.parametrize("how", ["locked_twice", "swallowed", "held"])
def test_a_third_signal_ends_it_at_once(how: str) -> None:
    running = blocked(1000, how)
    for _ in range(3):
        running.send_signal(signal.SIGINT)
        time.sleep(0.1)
    running.communicate(timeout=30)
    assert running.returncode == 130


def test_a_forced_end_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def ended_while_writing() -> None:
        with run_folders.writing(tmp_path / "a", True), files.atomic(tmp_path / "b"):
            assert len(list(tmp_path.iterdir())) == 2
            signals._end(signal.SIGTERM)
            assert (codes, list(tmp_path.iterdir())) == ([143], [])

    with pytest.raises(CovcliError, match="cannot be written"):  # nothing is left to be renamed
        ended_while_writing()


def test_what_is_being_saved_is_saved() -> None:
    running = blocked(0.1, "", "saving")
    running.send_signal(signal.SIGTERM)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err) == (9, "saved\n", "")


def test_the_patience_is_less_than_ten_seconds() -> None:
    assert signals.PATIENCE < 9


def test_a_signal_waits_for_the_step_and_a_second_changes_nothing(interrupts: Interrupts) -> None:
    reached = []

    def steps() -> None:
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("held back")
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("still held back")
            interrupts.check()
            reached.append("never")

    with pytest.raises(Interrupted) as caught:
        steps()
    assert reached == ["held back", "still held back"]
    assert caught.value.code == 130
    os.kill(os.getpid(), signal.SIGTERM)  # not while the first one is being dealt with either
    assert not isinstance(caught.value, Exception)  # no broad handler takes it for an error


def test_a_long_step_has_time_to_become_whole(
    interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with interrupts.deferred():
        assert interrupts.patience == signals.PATIENCE
        now[0] += 30
        interrupts.check()
        assert interrupts.patience == 60
    assert interrupts.patience == signals.PATIENCE
    with interrupts.saving():
        assert interrupts.patience == signals.SAVING


def test_forked_children_die_of_signals_by_themselves() -> None:
    code = """
import os, signal, time
from covcli.core import signals
with signals.watched():
    interrupts = signals.Interrupts()
    interrupts.install()
    signals.PATIENCE = 0.2
    child = os.fork()
    if not child:
        time.sleep(1000)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    time.sleep(1)  # longer than the watch would wait
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def train(folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "covcli", "train", "--trusted", "digits", "--model", "tiny",
         "--plugin", str(PLUGIN), "--epochs", "1000", "--quiet"],
        cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("seconds", [0.2, 1.0, 2.5])
def test_a_signal_while_loading_ends_it_without_a_traceback(tmp_path: Path, seconds: float) -> None:
    running = train(tmp_path)
    time.sleep(seconds)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143, err
    assert err in ("", "terminated\n", "terminated; go on with `covcli train --resume`\n")


def test_a_signal_from_the_first_line_on_prints_nothing() -> None:
    """Whatever is imported first, a signal during that import ends the process at once."""
    code = (
        "import os, signal, sys\n"
        "from covcli.__main__ import main\n"
        "class Sends:\n"
        "    def find_spec(self, name, *rest):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Sends())\n"
        "main(['points'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_little_is_imported_before_signals_are_handled() -> None:
    code = "import sys, covcli.__main__; print(*sys.modules)"
    home = str(Path(covcli.__file__).parents[1])  # -S: without what the environment imports
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": home},
    )  # fmt: skip
    ours = [name for name in done.stdout.split() if name.startswith("covcli.")]
    assert ours == ["covcli.core", "covcli.core.version", "covcli.__main__"]
    assert "typing" not in done.stdout.split()


def test_a_closing_terminal_counts_as_one_signal() -> None:
    """The kernel, the shell and the terminal each send SIGHUP: no reason to end at once."""
    running = blocked(1000, "held")
    for _ in range(4):
        running.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    assert running.poll() is None
    for _ in range(2):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    running.communicate(timeout=30)
    assert running.returncode == 129


def test_nohup_is_obeyed() -> None:
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from covcli.core import signals\n"
        "signals.Interrupts().install()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_patience_begins_with_the_first_signal_that_ends_it() -> None:
    """A program's own signals, as of its timers, count for nothing."""
    running = blocked(1.0, "alarmed")
    time.sleep(1.5)
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=30)
    assert (running.returncode, out) == (9, "time to end\n")


def test_a_rank_that_waits_for_its_master_ends(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    running = train(tmp_path, WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port))  # fmt: skip
    time.sleep(8)
    assert running.poll() is None
    began = time.monotonic()
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 143
    assert time.monotonic() - began < 10


def test_a_signal_at_exit_ends_it_without_a_traceback(tmp_path: Path) -> None:
    plugin = tmp_path / "slow_exit.py"
    plugin.write_text("import atexit, time\natexit.register(time.sleep, 1000)\n")
    command = [sys.executable, "-m", "covcli", "train", "--trusted", "no", "--plugin", str(plugin)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    assert running.stderr.readline().startswith("error: unknown dataset")
    time.sleep(0.5)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (143, "")
