"""The user's key: kept where only the user reads, and nobody else's seal holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from covcli.core import state


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "covcli"


def test_a_seal_holds_for_its_words_and_its_user_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = state.seal("a", "b")
    assert state.holds(seal, "a", "b")
    for words in (("a",), ("a", "c"), ("ab",), ("a", "b", "")):
        assert not state.holds(seal, *words)
    for claimed in ("", None, 3, seal[:-1], "é"):
        assert not state.holds(claimed, "a", "b")
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / "key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in place.iterdir()] == ["key"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert not state.holds(seal, "a", "b")


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707])
def test_a_folder_that_others_can_enter_keeps_no_key(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    place.mkdir(parents=True)
    place.chmod(mode)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state.folder() == tmp_path / "home" / ".local" / "state" / "covcli"
    assert state.seal("a")
    assert list(place.iterdir()) == []


def test_links_and_weak_keys_are_not_taken(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.seal("a")
    key = place / "key"
    key.chmod(0o644)
    assert state.seal("a") == ""
    key.unlink()
    (tmp_path / "planted").write_bytes(b"0" * 32)
    (tmp_path / "planted").chmod(0o600)
    key.symlink_to(tmp_path / "planted")
    assert state.seal("a") == ""


def test_without_any_writable_place_nothing_is_sealed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for name in ("XDG_STATE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    monkeypatch.setattr(state.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert state.folder() is None
    assert not state.holds(state.seal("a"), "a")


def test_processes_that_start_together_share_one_key(place: Path) -> None:
    command = [sys.executable, "-c", "from covcli.core import state; print(state.seal('a'))"]
    environment = {**os.environ, "XDG_STATE_HOME": str(place.parent)}
    runs = [subprocess.Popen(command, stdout=-1, env=environment, text=True) for _ in range(4)]
    seals = {run.communicate(timeout=60)[0] for run in runs}
    assert len(seals) == 1
    assert seals == {state.seal("a") + "\n"}
