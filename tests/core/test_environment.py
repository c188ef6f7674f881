"""What torchrun passes by environment variables: malformed, it is bad input like any other."""

import pytest

from covcli.__main__ import main
from covcli.core import distributed
from covcli.core.environment import whole_number
from covcli.core.errors import CovcliError


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "1e3", "٣", "9" * 5000, " 1"])
def test_a_command_whose_ranks_are_no_number_ends_in_one_line(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(SystemExit) as caught:
        main(["list"])
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: WORLD_SIZE: ")


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert whole_number("WORLD_SIZE", 1) == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "RANK: is not below WORLD_SIZE"),
        ({"RANK": "2"}, "RANK: is not below WORLD_SIZE"),
        ({"RANK": "0", "MASTER_PORT": ""}, "MASTER_ADDR"),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "invalid literal"),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "port must"),
    ],
)
def test_ranks_that_cannot_meet_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CovcliError, match=message):
        distributed.start("cpu")
