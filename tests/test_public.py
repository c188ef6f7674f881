"""The functions behind the commands, as a program calls them: by name, silently, by defaults."""

import inspect
from pathlib import Path

import pytest
import torch

import covcli
from covcli.models import checkpoint as checkpoints
from covcli.reporting.documents import read_evaluation


def test_every_public_name_is_there() -> None:
    assert set(covcli.__all__) <= set(dir(covcli))
    for name in covcli.__all__:
        assert getattr(covcli, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        covcli.trian  # noqa: B018


@pytest.mark.parametrize(
    "name", ["train", "build_signature", "merge_signatures", "evaluate", "report"]
)
def test_all_but_what_a_stage_is_about_has_a_default(name: str) -> None:
    needed = [
        parameter.name
        for parameter in inspect.signature(getattr(covcli, name)).parameters.values()
        if parameter.default is parameter.empty
    ]
    assert needed == ([] if name in ("train", "report") else ["config"])


def test_the_stages_run_from_a_program_and_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(tmp_path / "runs")
    torch.manual_seed(99)  # whatever the program drew before
    trained = covcli.train(
        covcli.TrainConfig(
            trusted="digits", untrusted=["photos?limit=20"], model="tiny", epochs=3,
            batch_size=32, learning_rate=0.1, runs=runs, name="a",
        )
    )  # fmt: skip
    halves = [
        covcli.build_signature(
            covcli.SignatureConfig(
                str(trained.checkpoint), "src", trusted=part, output=tmp_path / f"{i}.safetensors"
            )
        ).path
        for i, part in enumerate(("digits?limit=700", "digits?offset=700"))
    ]
    signature = covcli.merge_signatures(
        covcli.MergeConfig(halves, tmp_path / "s.safetensors", trained.checkpoint)
    )
    evaluation = covcli.evaluate(
        covcli.EvaluationConfig(
            ["photos?limit=30"], trained.checkpoint, signature.path, output=trained.run
        )
    )
    assert read_evaluation(trained.run / "evaluation.json") == evaluation
    written = covcli.report(runs=runs)
    assert written.html.parent.samefile(trained.run)
    monitor = covcli.Monitor.load(trained.checkpoint, signature.path)
    verdicts = monitor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert isinstance(verdicts, covcli.Verdicts)
    assert capsys.readouterr() == ("", "")


def test_the_seed_decides_whatever_was_drawn_before(tmp_path: Path) -> None:
    weights = []
    for name, drawn in (("a", 1), ("b", 2)):
        torch.manual_seed(drawn)
        config = covcli.TrainConfig(
            trusted="digits?limit=64", model="tiny", epochs=1, runs=tmp_path, name=name
        )
        result = covcli.train(config)
        weights.append(checkpoints.load(result.checkpoint).model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
