"""Merging: parts built from different images make what all of them together would."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from covcli.core import run_folders
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.methods import METHODS, Layout, Method, MultiRange, State, make_method
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.fit import fold
from covcli.signature.merge import MergeConfig, merge_signatures
from covcli.training.train import TrainResult

LAYOUT = Layout(3, (2, 3), (1, 3))


def complete(method: Method, neurons: torch.Tensor, labels: torch.Tensor) -> State:
    state = fold(method, LAYOUT, lambda: [(neurons, labels)])
    noisy = method.begin_noisy(state)
    if noisy is not None:
        method.observe_noisy(noisy, neurons + 0.5, labels)
        state.include(noisy)
    return state


def merged(method: Method, parts: list[State]) -> State:
    first, *others = method.align(parts)
    whole = copy.deepcopy(first)
    for part in others:
        whole.merge(part)
    return whole


def neurons_and_labels(seed: int, images: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 30.0, 0.01, 5.0, 1.0])
    return torch.randn(images, 5, generator=generator) * scale, torch.arange(images) % 3


@pytest.mark.parametrize("name", list(METHODS))
def test_merged_parts_are_close_to_the_whole(name: str) -> None:
    method = METHODS.get(name)()
    neurons, labels = neurons_and_labels(0)
    whole = complete(method, neurons, labels)
    sum_of_parts = merged(method, [complete(method, neurons[r::3], labels[r::3]) for r in range(3)])
    assert sum_of_parts.reductions == whole.reductions
    for key, tensor in whole.tensors.items():
        if key == "sections":  # no image is lost, and each is near where it was
            assert torch.equal(sum_of_parts[key].sum(2), tensor.sum(2))
            apart = (sum_of_parts[key].cumsum(2) - tensor.cumsum(2)).abs()
            assert bool((apart <= tensor + tensor.roll(-1, 2) + 2).all())
        elif tensor.dtype == torch.int64 and key not in ("count", "noisy_count"):
            np.testing.assert_allclose(sum_of_parts[key], tensor, atol=2 * len(labels), rtol=1e-5)
        else:
            assert torch.equal(sum_of_parts[key], tensor), key
    parts = [complete(method, neurons[r], labels[r]) for r in torch.arange(200).split(90)]
    again, backwards = merged(method, parts), merged(method, parts[::-1])
    nested = merged(method, [merged(method, parts[:2]), parts[2]])
    for key in again.tensors:
        assert torch.equal(again[key], backwards[key]), key
        assert torch.equal(nested[key].sum(-1), again[key].sum(-1)), key
        assert key == "sections" or torch.equal(nested[key], again[key]), key


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS.get(name).mergeable])
@pytest.mark.parametrize(("images", "kind"), [(200, torch.uint8), (2000, torch.int16)])
def test_a_condensed_state_gives_back_the_complete_one(
    name: str, images: int, kind: torch.dtype
) -> None:
    method = METHODS.get(name)()
    neurons, labels = neurons_and_labels(0, images)
    whole = complete(method, neurons.round(), labels)  # few values: many images in a section
    condensed = method.condense(whole)
    method.check(condensed)
    assert all(condensed[count].dtype == kind for count in method.counts)
    again = method.complete(condensed)
    assert again.reductions == whole.reductions
    for key, tensor in whole.tensors.items():
        assert torch.equal(again[key], tensor), key
        assert again[key].dtype == tensor.dtype
    scorers = method.prepare(whole), method.prepare(condensed)
    evidence = [scorer(2 * neurons, labels) for scorer in scorers]
    assert torch.equal(*evidence)
    for count in method.counts:
        with pytest.raises(ValueError, match="negative"):
            method.check(condensed.holding({**condensed.tensors, count: -whole[count] - 1}))


def test_parts_with_equal_ranges_merge_to_the_same_sections() -> None:
    neurons, labels = neurons_and_labels(1)
    ends = torch.cat([neurons.amin(0)[None], neurons.amax(0)[None]]).repeat_interleave(3, 0)
    parts = [
        (torch.cat([ends, neurons[r::2]]), torch.cat([torch.arange(6) % 3, labels[r::2]]))
        for r in range(2)
    ]
    method = MultiRange()
    whole = complete(method, *(torch.cat(column) for column in zip(*parts, strict=True)))
    sum_of_parts = merged(method, [complete(method, *part) for part in parts])
    for key, tensor in whole.tensors.items():
        assert torch.equal(sum_of_parts[key], tensor), key


def test_sections_are_counted_where_their_centres_lie() -> None:
    method = MultiRange(sections=4)
    labels = torch.zeros(4, dtype=torch.int64)
    narrow = torch.tensor([0.0, 1.0, 2.5, 4.0])[:, None].expand(-1, 5).contiguous()
    wide = torch.tensor([0.0, 8.0, 8.0, 8.0])[:, None].expand(-1, 5).contiguous()
    sum_of_parts = merged(method, [complete(method, v, labels) for v in (narrow, wide)])
    # Sections of the narrow part have centres 0.5, 1.5, 2.5, 3.5; those of the union are 2 wide.
    assert sum_of_parts["sections"][0, 0].tolist() == [2 + 1, 2, 0, 3]
    assert sum_of_parts["sections"][1:].sum() == 0


def built(trained: TrainResult, folder: Path, name: str, **changes: object) -> Path:
    settings = {"method": "src", "output": folder / f"{name}.safetensors"}
    config = SignatureConfig(trained.checkpoint, **{**settings, **changes})  # type: ignore[arg-type]
    return build_signature(config, Silent()).path


def test_merged_signatures_are_calibrated_like_the_whole(
    trained: TrainResult, tmp_path: Path
) -> None:
    a, b, c = (
        built(trained, tmp_path, name, trusted=f"digits?{part}", confidence_threshold=0.0)
        for name, part in (("a", "limit=500"), ("b", "offset=500&limit=400"), ("c", "offset=900"))
    )
    whole = built(trained, tmp_path, "whole", confidence_threshold=0.0)
    both, output = tmp_path / "both.safetensors", tmp_path / "merged.safetensors"
    merge_signatures(MergeConfig((a, b), both, trained.checkpoint), Silent())
    result = merge_signatures(MergeConfig((both, c), output, trained.checkpoint), Silent())
    expected, actual = load_file(whole), load_file(result.path)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key
    assert sum(result.trusted.values()) == int(expected["state.count"].sum())
    with pytest.raises(CovcliError, match="exists"):
        merge_signatures(MergeConfig((both, c), output, trained.checkpoint), Silent())
    again = MergeConfig((both, a), tmp_path / "again.safetensors", trained.checkpoint)
    with pytest.raises(CovcliError, match="built from the same images"):  # a counts already
        merge_signatures(again, Silent())


def test_only_signatures_that_kept_their_sums_are_merged(
    trained: TrainResult, tmp_path: Path
) -> None:
    plain = built(trained, tmp_path, "plain", method="ensemble", trusted="digits?limit=700")
    halves = [
        built(trained, tmp_path, name, method="ensemble", trusted=half, mergeable=True)
        for name, half in (("a", "digits?limit=700"), ("b", "digits?offset=700"))
    ]
    without, kept = load_file(plain), load_file(halves[0])
    assert {key for key in kept if not key.startswith("sums.")} == without.keys()
    for key, tensor in without.items():  # the same verdicts, to the last bit
        assert torch.equal(kept[key], tensor), key
    assert plain.stat().st_size < halves[0].stat().st_size
    output = tmp_path / "merged.safetensors"
    refused = MergeConfig((halves[1], plain), output, trained.checkpoint)
    with pytest.raises(CovcliError, match=r"plain.*build-signature --mergeable"):
        merge_signatures(refused, Silent())
    assert not output.exists()
    result = merge_signatures(MergeConfig(tuple(halves), output, trained.checkpoint), Silent())
    merged_again = load_file(result.path)
    assert result.mergeable
    assert merged_again.keys() == kept.keys()
    # The noisy copies of the parts are not those of the whole; all else is.
    whole = load_file(built(trained, tmp_path, "whole", method="ensemble", mergeable=True))
    for key in ("low", "high", "mean", "deviation"):
        np.testing.assert_allclose(
            merged_again[f"state.{key}"], whole[f"state.{key}"], rtol=1e-5, atol=1e-6
        )


def test_of_two_merges_into_one_file_the_second_is_refused(
    trained: TrainResult, tmp_path: Path
) -> None:
    halves = (
        built(trained, tmp_path, "a", trusted="digits?limit=700"),
        built(trained, tmp_path, "b", trusted="digits?offset=700"),
    )
    config = MergeConfig(halves, tmp_path / "merged.safetensors", trained.checkpoint)
    with run_folders.writing(config.output, force=False):  # as the first one does
        with pytest.raises(CovcliError, match="another process is writing this file"):
            merge_signatures(config, Silent())
        assert not config.output.exists()
    assert merge_signatures(config, Silent()).path == config.output


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": "mrc"}, "differs in method"),
        ({"granularity": "unit"}, "differs in model"),  # other coverage points
        ({"confidence_threshold": 0.5}, "differs in confidence threshold"),
        ({"calibration": "digits?split=test"}, "differs in calibration images"),
        ({"alpha": 0.1}, "differs in guarantee"),
        ({"trusted": "digits?limit=700"}, "built from the same images"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    changes: dict[str, object], complaint: str, trained: TrainResult, tmp_path: Path
) -> None:
    one = built(trained, tmp_path, "one", trusted="digits?limit=700")
    other = built(trained, tmp_path, "other", **{"trusted": "digits?offset=700", **changes})
    config = MergeConfig((one, other), tmp_path / "merged.safetensors", trained.checkpoint)
    with pytest.raises(CovcliError, match=complaint):
        merge_signatures(config, Silent())
    assert not config.output.exists()


def test_parts_of_different_networks_are_refused(trained: TrainResult, tmp_path: Path) -> None:
    one = built(trained, tmp_path, "one", trusted="digits?limit=700")
    content = torch.load(trained.checkpoint, weights_only=True)["content"]
    weights = {k.removeprefix("network."): v + 0.01 for k, v in content["state"].items()
               if k.startswith("network.")}  # fmt: skip
    torch.save(weights, tmp_path / "other.pt")
    other = build_signature(
        SignatureConfig(
            tmp_path / "other.pt", "src", trusted="digits?offset=700", model="tiny",
            calibration="digits?split=test", output=tmp_path / "other.safetensors",
        ),
        Silent(),
    )  # fmt: skip
    config = MergeConfig((one, other.path), tmp_path / "merged.safetensors", trained.checkpoint)
    with pytest.raises(CovcliError, match="differs in model"):
        merge_signatures(config, Silent())
    assert make_method(other.method) == make_method("src")
