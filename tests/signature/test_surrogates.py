"""Surrogate outliers: what each distortion keeps and changes."""

import numpy as np
import pytest
import torch

from covcli.data.images import in_memory
from covcli.signature.surrogates import DISTORTIONS, EXPERTS, OTHER_CLASS, distorted, draw


def images(shape: tuple[int, int, int], count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(60, 190, (count, *shape), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", list(DISTORTIONS))
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 5, 7)])
def test_every_distortion_is_of_the_image_alone(kind: str, shape: tuple[int, int, int]) -> None:
    originals = in_memory("random", images(shape), np.arange(6))
    distortions = distorted(originals, kind)
    whole = distortions.batch(torch.arange(6), shape)
    assert whole.dtype == torch.uint8
    assert whole.shape == (6, *shape)
    assert not torch.equal(whole, originals.batch(torch.arange(6), shape))
    alone = [distortions.batch(torch.tensor([row]), shape) for row in (5, 0, 3)]
    assert torch.equal(torch.cat(alone), whole[[5, 0, 3]])
    assert torch.equal(distortions.known_labels(), originals.known_labels())
    assert distortions.source.fingerprint != originals.source.fingerprint


def test_distortions_do_what_they_say() -> None:
    shape = (3, 32, 32)
    original = images(shape, 40)
    distortions = {
        kind: distorted(in_memory("random", original, None), kind).batch(torch.arange(40), shape)
        for kind in DISTORTIONS
    }
    added = distortions["noise"].double() - original.double()
    assert float(added.std()) == pytest.approx(8, rel=0.02)
    assert float(added.mean()) == pytest.approx(0, abs=0.1)
    assert float(distortions["blur"].double().std()) < 0.4 * float(original.double().std())
    for kind in ("tiles-4", "tiles-8"):
        side = 32 // int(kind[-1])
        for before, after in zip(original, distortions[kind], strict=True):
            tiles = [
                sorted(
                    tuple(picture[:, y : y + side, x : x + side].flatten().tolist())
                    for y in range(0, 32, side)
                    for x in range(0, 32, side)
                )
                for picture in (before, after)
            ]
            assert tiles[0] == tiles[1]


def test_surrogates_and_their_other_classes_are_drawn_at_random_by_seed() -> None:
    fitting = torch.arange(4000) % 4 == 0
    drawn = draw(fitting, 500, 7, seed=3)
    assert len(drawn.rows) == 500
    assert bool(fitting[drawn.rows].all())
    assert bool((drawn.rows.diff() > 0).all())
    assert 1600 < float(drawn.rows.double().mean()) < 2400  # of the whole file, not its beginning
    classes = torch.arange(500) % 7
    others = drawn.other_classes(drawn.rows, classes, 7)
    assert bool((others != classes).all())
    for k in range(7):  # each other class about as often
        counts = torch.bincount(others[classes == k], minlength=7)
        assert counts[k] == 0
        assert int(counts[torch.arange(7) != k].min()) >= 3
    # An image's class is the same in whatever batch it comes.
    some = torch.tensor([7, 250, 499])
    assert torch.equal(drawn.other_classes(drawn.rows[some], classes[some], 7), others[some])
    assert not torch.equal(draw(fitting, 500, 7, seed=4).rows, drawn.rows)
    few = draw(fitting[:8], 500, 2, seed=0)
    assert few.rows.tolist() == [0, 4]
    assert few.other_classes(few.rows, torch.tensor([0, 1]), 2).tolist() == [1, 0]


def test_experts_learn_from_what_there_is() -> None:
    known = {*DISTORTIONS, OTHER_CLASS}
    assert {kind for kinds in EXPERTS.values() for kind in kinds} == known
