"""train: train a network with the ConfidenceLoss, and log its coverage."""

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from covcli.attacks import attacks
from covcli.core import distributed, files, run_folders, runtime
from covcli.core.opening import is_folder, real
from covcli.core.progress import Progress, Silent
from covcli.core.signals import Interrupted, Interrupts
from covcli.core.specs import parse
from covcli.data import datasets, image_files, reading, recorded
from covcli.data.images import DataRecord
from covcli.methods import make_method
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import architecture
from covcli.models.checkpoint import Checkpoint
from covcli.reporting.documents import TRAINING_SCHEMA, EpochLog
from covcli.reporting.terminal import say
from covcli.training import paused
from covcli.training.config import TrainConfig
from covcli.training.paused import PAUSED_FILE
from covcli.training.session import Session, split_rows

__all__ = ["TrainConfig", "TrainResult", "resume", "split_rows", "train"]


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    Attributes
    ----------
    run, checkpoint, log
        The run folder, and in it the checkpoint and the JSON log (with a pickle beside it).
    epochs
        One entry per epoch.
    training_images, calibration_images
        The numbers of images that trained the network, and of held-out images.
    unreadable_images
        The number of files skipped because they cannot be read.
    data
        The record of the training data.
    checkpoint_fingerprint
        The fingerprint of the trained weights.
    provenance
        Versions, command line, device, threads, seed and time.

    Examples
    --------
    >>> from torch import nn
    >>> from covcli import TrainConfig
    >>> from covcli.models.architectures import model
    >>> @model("linear", size=8)
    ... def linear(classes, pretrained):
    ...     head = nn.Linear(4 * 6 * 6, classes)
    ...     return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), head)
    >>> result = train(TrainConfig(trusted="digits?limit=64", model="linear", epochs=2))
    >>> [entry.epoch for entry in result.epochs], result.checkpoint.parent == result.run
    ([1, 2], True)
    """

    run: Path
    checkpoint: Path
    log: Path
    epochs: list[EpochLog]
    training_images: int
    calibration_images: int
    unreadable_images: int
    data: DataRecord
    checkpoint_fingerprint: str
    provenance: dict[str, Any]


def train(
    config: TrainConfig = TrainConfig(),
    progress: Progress = Silent(),
    interrupts: Interrupts | None = None,
) -> TrainResult:
    """Train a network and write its run folder.

    Parameters
    ----------
    config
        The settings; by default a VGG19 on CIFAR-10.
    progress
        Receives the progress; by default it is not shown.
    interrupts
        Receives signals; an interrupted run saves its state for `resume`. None: signals are not
        handled.

    Raises
    ------
    CovcliError
        If a setting, a name or the data is invalid, the run folder exists, or training diverges.
        The run folder is removed then, unless the run can be resumed.
    Interrupted
        If a signal arrived; the run can be resumed.

    Examples
    --------
    >>> from covcli import TrainConfig, train
    >>> result = train(TrainConfig(trusted="digits?limit=64", model="vgg11", epochs=1, name="mine"))
    >>> result.checkpoint, result.training_images, result.calibration_images
    (PosixPath('runs/mine/checkpoint.pt'), 58, 6)
    """
    config = replace(
        config,
        trusted=reading.completed(config.trusted),  # so that it can be resumed without options
        untrusted=datasets.expand(config.untrusted, config.data_dir),
    )
    _check(config)
    stem = f"{config.model.replace(':', '-')}-{make_method(config.method).name}"
    folder = run_folders.new_run(config.runs, config.name, stem) if distributed.is_first() else None
    run = distributed.agree(folder) or config.runs
    session = Session(config, datasets.load(config.trusted, "train", config.data_dir))
    return _finish(session, run, progress, interrupts or Interrupts(), new=True)


def resume(
    run: Path,
    progress: Progress = Silent(),
    data_dir: Path | None = None,
    interrupts: Interrupts | None = None,
    named: Collection[str] = (),
) -> TrainResult:
    """Resume an interrupted or killed run from its last saved step.

    The final weights are bit-identical to those of an uninterrupted run, on the same machine with
    the same number of threads.

    Parameters
    ----------
    run
        The run folder.
    progress, interrupts
        As for `train`.
    data_dir
        The folder of downloaded sets; None: the one of the run.
    named
        Specifications of data that the user named. If the run belongs to another user, data with a
        path is read only if it is named here.

    Raises
    ------
    CovcliError
        If the run has nothing to resume, its data has changed or may not be read, or another
        process is running it.
    Interrupted
        If a signal arrived; the run can be resumed again.
    """
    # All ranks resume from the state that the first one reads.
    content, own = distributed.agree(paused.read(run) if distributed.is_first() else ({}, False))
    config = paused.restored_config(content, own, run, data_dir)
    _check(config)
    for option, text in [
        ("trusted", config.trusted),
        *(("untrusted", t) for t in config.untrusted),
    ]:
        recorded.allow_spec(text, own, f"name it by --{option} {text}", named)
    ran_in = Path(str(content.get("ran_in", "")) if own else "")
    images = datasets.load(config.trusted, "train", config.data_dir, ran_in)
    session = Session(config, images, ran_in)
    session.restore(content, run / PAUSED_FILE)
    return _finish(session, run, progress, interrupts or Interrupts(), new=False)


def interrupted_run(name: str, runs: Path) -> Path:
    """Return the folder of a run to resume.

    Parameters
    ----------
    name
        A run's folder, or its name in `runs`; "latest" is the most recently saved run that can be
        resumed, independent of `runs/latest`.
    runs
        The folder of run folders.

    Raises
    ------
    CovcliError
        If `name` is "latest", and no run can be resumed.
    """
    if name == "latest":
        return run_folders.last_interrupted(runs, PAUSED_FILE)
    return real(Path(name) if is_folder(Path(name)) else runs / name)


def _finish(
    session: Session, run: Path, progress: Progress, interrupts: Interrupts, new: bool
) -> TrainResult:
    """Train to the end in a locked run folder, saving regularly and when interrupted.

    No saved file is removed, except the state for `resume` after the results were written.
    """
    with run_folders.locked(run, new) if distributed.is_first() else nullcontext():
        try:
            session.run(run, progress, interrupts)
        except Interrupted as error:
            with interrupts.saving():
                session.save(run / PAUSED_FILE)
                if distributed.is_first():
                    run_folders.mark_latest(run)
            error.resume = "train --resume"
            raise
        with interrupts.saving():
            result = _result(run, session)
            if distributed.is_first():
                _write(run, session, result)
    interrupts.check()
    return result


def _check(config: TrainConfig) -> None:
    """Raise a CovcliError if a name is unknown, before anything is loaded or made."""
    make_method(config.method)
    architecture(config.model)
    datasets.check_name(config.trusted)
    for text in config.untrusted:
        _check_untrusted(text)


def _check_untrusted(text: str) -> None:
    spec = parse(text)
    if attacks.is_attack(spec):
        attacks.check_without_signature(text)
    else:
        datasets.check_name(text)


def _result(run: Path, session: Session) -> TrainResult:
    weights = files.fingerprint(session.trainer.model.state_dict())
    provenance = runtime.provenance(session.trainer.model.mean.device, session.config.seed)
    return TrainResult(
        run=run,
        checkpoint=run / "checkpoint.pt",
        log=run / distributed.agree(f"training_results_{run_folders.timestamp()}.json"),
        epochs=session.history,
        training_images=len(session.training),
        calibration_images=len(session.held_out),
        unreadable_images=len(session.images.origin.unreadable),
        data=recorded.sealed(DataRecord.of(session.images), weights),
        checkpoint_fingerprint=weights,
        provenance=distributed.agree(provenance),
    )


def _write(run: Path, session: Session, result: TrainResult) -> None:
    """Write the checkpoint and the logs into the run folder, and link `latest` to it."""
    settings = session.settings()
    checkpoints.save(
        result.checkpoint,
        Checkpoint(
            result.checkpoint, session.trainer.model, session.classes, result.data,
            session.calibration_rows, settings,
        ),
    )  # fmt: skip
    document = {
        "schema": TRAINING_SCHEMA,
        "provenance": result.provenance,
        "settings": settings,
        "data": vars(result.data),
        "checkpoint_fingerprint": result.checkpoint_fingerprint,
        "training_images": result.training_images,
        "calibration_images": result.calibration_images,
        "unreadable_images": result.unreadable_images,
        "epochs": [asdict(entry) for entry in session.history],
    }
    image_files.list_unreadable(run / "unreadable-train.txt", [session.images])
    files.write_json(result.log, files.plain(document))
    files.write_pickle(result.log.with_suffix(".pkl"), files.plain(document))
    run_folders.mark_latest(run)
    (run / PAUSED_FILE).unlink(missing_ok=True)


def describe_training(result: "TrainResult") -> None:
    """Print a summary of the training on stderr; stdout receives only the path."""
    last = result.epochs[-1]
    say(
        f"trained on {result.training_images} images for {len(result.epochs)} epochs: held-out "
        f"accuracy {last.held_out_accuracy:.1%} on {result.calibration_images} calibration images"
    )
