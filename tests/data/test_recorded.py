"""A path that a file names is read only if the file is the user's own, or the user says so."""

from pathlib import Path

import pytest

from covcli.core import consent
from covcli.core.errors import CovcliError
from covcli.data import recorded
from covcli.data.images import DataRecord
from covcli.data.recorded import allow, allow_spec, reads_path, sealed, verified

PRIVATE = DataRecord("folder:/home/me/private?limit=9", "1", "2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cifar10", False), ("digits?split=train&limit=3", False), ("noise:uniform?seed=3", False),
        ("attack:pgd?eps=8/255", False), ("npz:x.npz", True), ("folder:photos", True),
        ("csv:x.csv", True), ("of-a-plugin:/etc/passwd", True),
        ("noise:uniform?of=folder:private", True), ("noise:uniform?of=cifar10", False),
    ],
)  # fmt: skip
def test_which_specifications_can_name_a_path(text: str, expected: bool) -> None:
    assert reads_path(text) == expected


def test_a_seal_holds_for_the_same_data_and_the_same_network() -> None:
    mine = sealed(PRIVATE, "network")
    assert verified(mine, lambda: "network") == mine
    for record, network in (
        (mine, "another"), (PRIVATE, "network"),
        (DataRecord("folder:/home/me/else", "1", "2", mine.seal), "network"),
        (DataRecord(PRIVATE.spec, "1", "3", mine.seal), "network"),
        (DataRecord(PRIVATE.spec, "1", "2", "0" * 64), "network"),
    ):  # fmt: skip
        assert verified(record, lambda network=network: network).seal == ""


def test_only_the_owner_and_whoever_names_it_may_read() -> None:
    allow(sealed(PRIVATE, "network"), "fix")
    allow(DataRecord("cifar10", "1", "2"), "fix")
    for named in (
        [PRIVATE.spec],
        ["folder:/home/me/private"],
        [None, "folder:/home/me/private?x=1"],
    ):
        allow(PRIVATE, "fix", named)
    for named in ([], [None, ""], ["folder:/home/me"], ["npz:/home/me/private"], ["cifar10"]):
        with pytest.raises(CovcliError, match="has not written; the fix"):
            allow(PRIVATE, "the fix", named)
    with pytest.raises(CovcliError):  # naming the outer one is not naming the inner one
        allow_spec("blur:a?of=folder:/private", False, "fix", ["blur:a?of=cifar10"])


def test_a_terminal_is_asked_and_a_program_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Terminal:
        def __init__(self, answer: str) -> None:
            self.answer = answer

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            asked.append(text)

        def flush(self) -> None:
            pass

        def readline(self) -> str:
            return self.answer

    for answer, agreed in (
        ("y\n", True),
        ("yes\n", True),
        ("\n", False),
        ("", False),
        ("n", False),
    ):
        for name in ("stdin", "stderr"):
            monkeypatch.setattr(consent.sys, name, Terminal(answer))
        monkeypatch.setattr(consent, "_may_ask", True)
        monkeypatch.setattr(consent, "_answers", {})
        assert consent.agrees("Read\x1b it?") == agreed
        assert consent.agrees("Read\x1b it?") == agreed  # without being asked again
        assert asked.pop() == "Read\\x1b it? [y/N] "
        monkeypatch.setattr(consent, "_may_ask", False)
        assert not consent.agrees("Read it?")
    assert asked == []
    monkeypatch.setattr(recorded.consent, "agrees", lambda question: PRIVATE.spec in question)
    allow(PRIVATE, "fix")


def test_a_file_cannot_say_that_it_is_trusted(tmp_path: Path) -> None:
    with pytest.raises(CovcliError):
        allow(verified(DataRecord("folder:/x", "1", "2", "true"), lambda: ""), "fix")
