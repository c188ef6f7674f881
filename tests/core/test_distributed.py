"""Ranks: any number of them ends with what one process ends with; failures are told once."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import free_port, torchrun

WORKER = Path(__file__).parent / "rank_worker.py"


def results_of(size: int, folder: Path) -> list[dict]:
    """Run so many ranks to their end, and return what each has found."""
    folder.mkdir()
    common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, WORKER, folder], env={**common, "RANK": str(rank)})
        for rank in range(size)
    ]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results_of(1, tmp_path_factory.mktemp("ranks") / "1")[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_end_with_what_one_process_ends_with(
    size: int, one_process: dict, tmp_path: Path
) -> None:
    ranks = results_of(size, tmp_path / "ranks")
    alone = dict(one_process)
    training = alone.pop("training")
    trainings = [results.pop("training") for results in ranks]
    assert ranks == [alone] * size  # signatures and scores, bit for bit
    assert trainings == [trainings[0]] * size
    # Gradients are summed in another order: equal but for rounding, which training amplifies.
    for figure in ("losses", "accuracy", "coverage"):
        np.testing.assert_allclose(trainings[0][figure], training[figure], rtol=0.02, atol=0.02)


def test_only_the_first_rank_writes_and_prints(run: Path) -> None:
    whole = run.parent / "whole"
    shutil.copytree(run, whole)
    options = ["--untrusted", "photos?limit=3", "--trusted", "digits?split=test&limit=97"]
    options += ["--runs", run.parent, "--threads", "1", "--json"]
    documents = []
    for ranks, folder in ((1, run), (3, whole)):
        done = torchrun(ranks, "evaluate", "--checkpoint", folder / "checkpoint.pt", *options)
        assert done.returncode == 0, done.stderr
        documents.append(json.loads(done.stdout))
    files = [sorted(path.name for path in folder.iterdir()) for folder in (run, whole)]
    assert files[0] == files[1]
    for document, ranks in zip(documents, (1, 3), strict=True):
        assert document.pop("provenance")["ranks"] == ranks
        for place in (document.pop("files"), document["signature"]):
            place.pop("path", None), place.pop("checkpoint", None)
    assert documents[0] == documents[1]


FAILING = """
import os
from covcli.data import DATASETS
from covcli.data.named import digits
from covcli.core.errors import CovcliError

@DATASETS.add("failing")
def failing(request):
    if os.environ["RANK"] == "1":
        {failure}
    return digits(request)
"""


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ('raise CovcliError("is broken", where="disk")', "error: rank 1: disk: is broken"),
        ("os.kill(os.getpid(), 9)", "exitcode  : -9"),
    ],
)
def test_a_failing_rank_ends_all_and_is_named(
    failure: str, told: str, run: Path, tmp_path: Path
) -> None:
    plugin = tmp_path / "failing.py"
    plugin.write_text(FAILING.format(failure=failure))
    began = time.monotonic()
    done = torchrun(
        3, "build-signature", run / "checkpoint.pt", "--trusted", "failing", "--calibration",
        "digits?split=test", "--output", tmp_path / "s.safetensors", "--plugin", plugin,
    )  # fmt: skip
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    assert told in done.stderr
    assert done.stderr.count("\nerror: ") + done.stderr.startswith("error: ") <= 1
    assert not (tmp_path / "s.safetensors").exists()
    root_cause = done.stderr.split("Root Cause")[1]
    assert "rank      : 1" in root_cause
