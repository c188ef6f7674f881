"""DriftWatch: one stream in any number of calls, and a state that belongs to one signature."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from covcli.core import run_folders
from covcli.core.errors import CovcliError
from covcli.data import datasets
from covcli.monitoring.drift import DriftWatch
from covcli.monitoring.inspect import inspect_file
from covcli.monitoring.inspection import as_table
from covcli.signature import judge as judges
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.monitor import Monitor


@pytest.fixture
def monitor(run: Path) -> Monitor:
    return Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors")


def scores(monitor: Monitor, names: list[str]) -> np.ndarray:
    sets = [datasets.load(name, "test") for name in names]
    batches = [images.batch(torch.arange(len(images)), (3, 32, 32)) for images in sets]
    return np.concatenate([monitor(batch).score.numpy() for batch in batches])


def test_a_state_goes_on_bit_for_bit(monitor: Monitor, tmp_path: Path) -> None:
    stream = scores(monitor, ["digits?limit=200", "photos?limit=60"])
    whole = DriftWatch(monitor, 0.05, seed=3, run_length=500)
    names = [f"image {i}" for i in range(1, 261)]
    expected = whole.update(stream, names)
    path, values = tmp_path / "state", []
    parted = DriftWatch(monitor, 0.05, seed=3, run_length=500)
    for begin in range(0, 260, 37):
        parted.save(path)
        parted = DriftWatch.load(path, monitor)
        part = slice(begin, begin + 37)
        values.append(parted.update(stream[part], names[part]))
    np.testing.assert_array_equal(np.concatenate(values), expected)
    assert parted.status == whole.status
    whole.save(path)
    inspection = inspect_file(path)
    assert (inspection.kind, inspection.drift) == ("drift state", whole.status)
    assert ["alarm image", str(whole.status.alarm_image)] in as_table(inspection).rows
    for watch in (parted, whole):
        watch.save(path)
        watch.update(stream[:5])
    assert parted.status == whole.status
    # Nothing was found among digits, and photographs soon after they came.
    status = whole.status
    assert status.alarm
    assert status.alarm_image is not None
    assert 200 < status.alarm_image < 240
    assert status.alarm_name == f"image {status.alarm_image}"
    assert abs(status.lowest_image - 200) < 20
    assert (
        expected[status.alarm_image - 1]
        >= math.log10(20)
        > expected[: status.alarm_image - 1].max()
    )
    assert status.quick_alarms >= 1


def test_a_state_fits_its_signature_whether_that_has_scored_or_not(
    monitor: Monitor, run: Path, tmp_path: Path
) -> None:
    scores(monitor, ["digits?limit=5"])
    fresh, _ = judges.load(run / "checkpoint.pt", run / "signature-mrc.safetensors")
    DriftWatch(fresh).save(tmp_path / "state")
    DriftWatch.load(tmp_path / "state", monitor)


def test_verdicts_and_their_scores_are_the_same_to_a_watch(monitor: Monitor) -> None:
    images = datasets.load("digits?limit=50", "test")
    verdicts = monitor(images.batch(torch.arange(50), (3, 32, 32)))
    by_verdict, by_score = DriftWatch(monitor), DriftWatch(monitor.judge)
    np.testing.assert_array_equal(
        by_verdict.update(verdicts), by_score.update(verdicts.score.tolist())
    )


def test_a_state_of_another_signature_or_a_damaged_one_is_refused(
    monitor: Monitor, run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    DriftWatch(monitor).save(path)
    other = build_signature(
        SignatureConfig(run / "checkpoint.pt", "src", calibration="digits?split=test", seed=1)
    )
    another = Monitor.load(run / "checkpoint.pt", other.path)
    with pytest.raises(CovcliError, match="another signature"):
        DriftWatch.load(path, another)
    # Another guarantee changes no score: it is the same stream.
    strict = Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors", alpha=0.2)
    assert DriftWatch.load(path, strict).status.images == 0
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-300] + b"x" * 300):
        path.write_bytes(damaged)
        with pytest.raises(CovcliError, match=str(path)):
            DriftWatch.load(path, monitor)
    shutil.copy(run / "checkpoint.pt", path)
    with pytest.raises(CovcliError, match="is no drift state"):
        DriftWatch.load(path, monitor)


def test_a_state_that_does_not_hold_together_is_refused(monitor: Monitor, tmp_path: Path) -> None:
    path = tmp_path / "state"
    watch = DriftWatch(monitor)
    watch.update([1.0, 2.0])
    watch.status = replace(watch.status, images=7)  # as many scores are not in the bag
    watch.save(path)
    with pytest.raises(CovcliError, match="another number of scores"):
        DriftWatch.load(path, monitor)


def test_bad_numbers_are_refused(monitor: Monitor, tmp_path: Path) -> None:
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(CovcliError, match="delta"):
            DriftWatch(monitor, delta)
    for length in (0, -1):  # of which there is no logarithm
        with pytest.raises(CovcliError, match="run_length"):
            DriftWatch(monitor, run_length=length)
    watch = DriftWatch(monitor)
    for seen, names, message in (
        (["a"], [], "no numbers"),
        ([1.0, 2.0], ["a"], "1 names of 2 images"),
        ([[1.0]], [], "not one a number an image"),
    ):
        with pytest.raises(CovcliError, match=message):
            watch.update(seen, names)
    watch.save(tmp_path / "state")  # what was refused has left no trace
    assert DriftWatch.load(tmp_path / "state", monitor).status == DriftWatch(monitor).status
    with pytest.raises(CovcliError, match="NaN"):
        watch.update([1.0, math.nan])
    assert watch.status.images == 0


def test_two_at_once_are_refused(run: Path, tmp_path: Path) -> None:
    from covcli.monitoring.check import CheckConfig, check

    state = tmp_path / "state"
    config = CheckConfig(
        ("digits?limit=3",), run / "checkpoint.pt", run / "signature-mrc.safetensors",
        drift=0.01, drift_state=state,
    )  # fmt: skip
    with run_folders.writing(state, True), pytest.raises(CovcliError, match="another process"):
        list(check(config))
    assert len(list(check(config))) == 3
    assert state.is_file()
