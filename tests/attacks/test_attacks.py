"""The attacks: one contract for all, and what each kind promises beyond it."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import nn

from covcli.attacks.adaptive import Monitored
from covcli.attacks.attacks import ATTACKS, attacked_rows, run_attack
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.core.specs import parse
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier
from covcli.models.spec import ModelSpec
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureConfig, SignatureResult, build_signature
from covcli.signature.judge import Judge
from covcli.training.train import TrainResult, train

pytestmark = pytest.mark.usefixtures("foolbox")
# Parameters for a test; the norm and the budget that the attack keeps, where it has one.
CASES = {
    "fgsm": ("eps=16/255", math.inf, 16 / 255),
    "pgd": ("eps=16/255", math.inf, 16 / 255),
    "adaptive-pgd": ("eps=16/255&steps=10", math.inf, 16 / 255),
    "pgd-l2": ("eps=3/2", 2.0, 1.5),
    "deepfool": ("steps=10", 2.0, math.inf),
    "cw": ("steps=30&binary_search_steps=2&initial_const=10", 2.0, math.inf),
    "boundary": ("steps=60", 2.0, math.inf),
}
NEAREST = ["deepfool", "cw", "boundary"]
ROUNDING = {2.0: math.sqrt(3 * 32 * 32) / 510, math.inf: 1e-6}
IMAGES = 40


@pytest.fixture
def model(trained: TrainResult) -> Classifier:
    return checkpoints.load(trained.checkpoint).model


@pytest.fixture
def look(model: Classifier, signed: SignatureResult) -> Monitored:
    signature, calibration, _ = signatures.load(signed.path)
    return Judge.of(model, signature, calibration).monitored()


@pytest.fixture
def digits() -> ImageSet:
    return datasets.load(f"digits?limit={IMAGES}", "test")


def pixels(images: ImageSet) -> torch.Tensor:
    return images.batch(torch.arange(len(images)), (3, 32, 32)).float() / 255


def predict(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


def shuffled(change: torch.Tensor) -> torch.Tensor:
    """Noise of the same size in every norm: the change's values in other places, signs drawn."""
    flat = change.flatten(1)
    order = torch.rand(flat.shape).argsort(1)
    signs = torch.randint(0, 2, flat.shape) * 2 - 1
    return (flat.gather(1, order) * signs).view_as(change)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_keeps_the_contract(
    name: str, model: Classifier, look: Monitored, digits: ImageSet
) -> None:
    parameters, norm, budget = CASES[name]
    spec, labels = parse(f"attack:{name}?{parameters}&seed=1"), digits.known_labels()
    attacked = run_attack(spec, model, digits, labels, Silent(), look)
    before, after = pixels(digits), pixels(attacked)
    sizes = (after - before).flatten(1).norm(norm, dim=1)
    assert float(sizes.max()) <= budget + ROUNDING[norm]
    assert torch.equal(attacked.known_labels(), labels)
    right = predict(model, before) == labels
    deceived = (predict(model, after) != labels)[right].float().mean()
    noise = (before + shuffled(after - before)).clamp(0, 1)
    by_noise = (predict(model, noise) != labels)[right].float().mean()
    assert float(deceived) > float(by_noise) + 0.2
    again = run_attack(spec, model, digits, labels, Silent(), look)
    assert again.fingerprint == attacked.fingerprint
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(CovcliError, match="unknown parameter"):
        run_attack(parse(f"attack:{name}?size=1"), model, digits, labels, Silent(), look)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_images_that_are_wrong_already_are_no_error(
    name: str, model: Classifier, look: Monitored, digits: ImageSet
) -> None:
    labels = (predict(model, pixels(digits)) + 1) % 10
    spec = parse(f"attack:{name}?{CASES[name][0]}")
    attacked = run_attack(spec, model, digits, labels, Silent(), look)
    assert torch.equal(attacked.known_labels(), labels)
    if name in NEAREST:  # the nearest image that is wrong is the image itself
        assert torch.equal(pixels(attacked), pixels(digits))


@pytest.mark.parametrize("name", NEAREST)
def test_the_nearest_images_deceive_in_8_bits_or_are_as_they_were(
    name: str, model: Classifier, digits: ImageSet
) -> None:
    labels = digits.known_labels()
    spec = parse(f"attack:{name}?{CASES[name][0]}")
    before = pixels(digits)
    after = pixels(run_attack(spec, model, digits, labels, Silent()))
    changed = (after != before).flatten(1).any(1)
    assert bool((predict(model, after)[changed] != labels[changed]).all())
    assert float(changed.float().mean()) > 0.5
    lone = digits.select(torch.tensor([0]))  # no other image to start from
    run_attack(spec, model, lone, lone.known_labels(), Silent())
    with torch.no_grad():  # a network that only ever answers 3
        model.network.last.weight.zero_()
        model.network.last.bias.copy_(torch.arange(10) == 3)
    threes = torch.full_like(labels, 3)
    attacked = run_attack(spec, model, digits, threes, Silent())
    assert torch.equal(pixels(attacked), before)


@pytest.mark.parametrize("attack", ["attack:cw", "attack:deepfool"])
def test_on_a_linear_network_the_nearest_images_are_at_the_boundary(
    attack: str,
) -> None:
    images = datasets.load("noise:uniform?limit=400&seed=1", "test")
    spec = ModelSpec("linear", 2, (3, 32, 32), mean=(0.5,) * 3, deviation=(0.25,) * 3)
    head = nn.Linear(3 * 32 * 32, 2)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:, ::97] = torch.randn(2, 32) / 8
    model = Classifier(spec, nn.Sequential(nn.Flatten(), head)).eval()
    normal = (head.weight[0] - head.weight[1]).detach() / 0.25

    def margins(images: ImageSet) -> torch.Tensor:
        with torch.no_grad():
            logits = model(pixels(images))
        return (logits[:, 0] - logits[:, 1]) / normal.norm()

    distances = margins(images).abs()
    images = images.select(((distances > 0.04) & (distances < 0.08)).nonzero()[:40, 0])
    nearest = margins(images)
    attacked = run_attack(parse(attack), model, images, (nearest < 0).long(), Silent())
    sizes = (pixels(attacked) - pixels(images)).flatten(1).norm(dim=1)
    ratios = sizes / nearest.abs()
    assert float(ratios.min()) >= 1  # nearer, no image deceives
    assert float(ratios.median()) < 1.06  # 1.07 if a search of `cw` may end early


def test_a_dear_attack_takes_fewer_images() -> None:
    digits = datasets.load("digits", "train")
    limits = {name: len(attacked_rows(parse(f"attack:{name}"), digits)) for name in ATTACKS}
    assert limits == {
        "fgsm": 1000, "pgd": 1000, "pgd-l2": 1000, "deepfool": 200, "cw": 100,
        "boundary": 50, "adaptive-pgd": 200,
    }  # fmt: skip
    rows = attacked_rows(parse("attack:cw?limit=3&offset=7"), digits)
    assert rows.tolist() == [7, 8, 9]


@pytest.mark.parametrize("method", ["src", "mrc", "ensemble"])
def test_the_adaptive_attack_evades_what_plain_pgd_does_not(
    method: str, trained: TrainResult, model: Classifier, digits: ImageSet, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    build_signature(SignatureConfig(trained.checkpoint, method, output=path), Silent())
    signature, calibration, _ = signatures.load(path)
    look = Judge.of(model, signature, calibration).monitored()
    labels = digits.known_labels()
    scores, rates = {}, {}
    for name in ("pgd", "adaptive-pgd"):
        spec = parse(f"attack:{name}?eps=16/255&steps=10&step=4/255")
        after = pixels(run_attack(spec, model, digits, labels, Silent(), look))
        with torch.no_grad():
            verdicts = look(after)
        scores[name] = float(verdicts.score.mean())
        rates[name] = float((verdicts.logits.argmax(1) != labels).float().mean())
    assert scores["adaptive-pgd"] < scores["pgd"]
    assert rates["adaptive-pgd"] >= rates["pgd"] - 0.1


def test_the_score_that_is_attacked_is_the_monitors(
    model: Classifier, signed: SignatureResult, look: Monitored, digits: ImageSet
) -> None:
    from covcli import Monitor

    signature, calibration, _ = signatures.load(signed.path)
    verdicts = Monitor(Judge.of(model, signature, calibration))(pixels(digits))
    scores = look(pixels(digits).requires_grad_())
    torch.testing.assert_close(scores.score, verdicts.score)
    assert scores.soft_score.requires_grad


def refusals(trained: TrainResult, tmp_path: Path) -> list[Callable[[], object]]:
    digits = datasets.load("digits?limit=5", "test")
    model = checkpoints.load(trained.checkpoint).model
    spec = parse("attack:adaptive-pgd")
    return [
        lambda: run_attack(spec, model, digits, digits.known_labels(), Silent()),
        lambda: train(tiny_config(tmp_path, untrusted=("attack:adaptive-pgd",)), Silent()),
    ]


def test_an_attack_on_the_signature_needs_one(trained: TrainResult, tmp_path: Path) -> None:
    for refused in refusals(trained, tmp_path):
        with pytest.raises(CovcliError, match="attacks a signature"):
            refused()
    assert not list(tmp_path.iterdir())
