"""Every option of every command, declared once: what it means, its panel and its names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from annotated_types import Interval

from covcli.commands.completion import completes
from covcli.commands.expand import (
    GUARANTEE,
    IMAGES,
    MACHINE,
    NETWORK,
    OUTPUT,
    WHAT,
    Help,
    OptionTable,
)
from covcli.core.choices import MOST, GranularityChoice, RegistryKind, Seed
from covcli.core.settings import settle
from covcli.core.specs import escaped
from covcli.evaluation.config import EvaluationConfig
from covcli.monitoring.config import CheckConfig, RowFormat
from covcli.monitoring.export_config import ExportConfig
from covcli.signature.config import MergeConfig, SignatureConfig
from covcli.training.config import TrainConfig


@dataclass(frozen=True)
class OutputOptions:
    """Options of every command: what to print."""

    quiet: bool = False
    json: bool = False
    debug: bool = False


@dataclass(frozen=True)
class PluginOptions(OutputOptions):
    """Options of a command that looks names up: where more names come from."""

    plugin: tuple[Path, ...] = ()


@dataclass(frozen=True)
class CommonOptions(PluginOptions):
    """Options of a command that reads images and computes."""

    skip_unreadable: bool = False
    max_pixels: Annotated[int, Interval(ge=1, lt=2**31)] | None = None
    labels_from: Annotated[int, Interval(ge=0, le=MOST)] = 0
    threads: Annotated[int, Interval(ge=0, le=1024)] = 0

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class CheckOptions(CommonOptions):
    """Options of `check`: what it prints, and what it fails on."""

    format: RowFormat | None = None
    fail_on: tuple[str, ...] = ()
    max_share: Annotated[float, Interval(ge=0, lt=1)] | None = None
    metrics: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        each = tuple(fault for given in self.fail_on for fault in given.split(","))
        object.__setattr__(self, "fail_on", each)


@dataclass(frozen=True)
class PixelOptions:
    """Of bare weights: the mean and the deviation of the pixels that they were trained with."""

    mean: str | None = None
    std: str | None = None


@dataclass(frozen=True)
class PointsOptions:
    """Options of `points`."""

    checkpoint: Path | None = None
    model: str | None = None
    classes: Annotated[int, Interval(ge=2, le=100_000)] = 10
    granularity: GranularityChoice = "channel"
    points: tuple[str, ...] = ()
    every: bool = False
    preprocess: str | None = None
    logits: str = ""

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class GateOptions:
    """What an evaluation must reach, else it exits with code 1."""

    fail_under: tuple[str, ...] = ()
    fail_over: tuple[str, ...] = ()
    baseline_results: Path | None = None
    tolerance: Annotated[float, Interval(ge=0, le=1)] = 0.01

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class EvaluationOutput:
    """What an evaluation prints and writes beside its own files."""

    verbose: bool = False
    junit: Path | None = None
    summary: Path | None = None
    annotations: Literal["github"] | None = None


@dataclass(frozen=True)
class ReportOptions:
    """Options of `report`."""

    run: Path | None = None
    output: Path | None = None
    force: bool = False
    runs: Path = Path("runs")


@dataclass(frozen=True)
class CompareOptions:
    """Options of `compare`."""

    before: Path
    after: Path
    fail_over: tuple[str, ...] = ()
    output: Path | None = None
    force: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        settle(self)


def _data(help: str, *names: str, attacked: bool = False) -> Help:
    """Describe an option that takes a specification of images."""
    completed = completes("datasets", "attacks") if attacked else completes("datasets")
    return Help(help, IMAGES, names, "IMAGES", escaped, completed)


def _method(help: str, panel: str = WHAT) -> Help:
    """Describe an option that takes a method."""
    return Help(help, panel, completes=completes("methods"))


def _model(help: str) -> Help:
    """Describe an option that takes a model."""
    return Help(help, NETWORK, ("-m",), "NAME", completes=completes("models"))


TERMINAL = {
    "quiet": Help("Print nothing to stderr but errors.", OUTPUT, ("-q",)),
    "json": Help("Print one JSON document to stdout.", OUTPUT),
    "debug": Help("Show the traceback of an error.", OUTPUT),
}
EXTENDED = TERMINAL | {
    "plugin": Help(
        "Python file to run first: it can register models, datasets and methods; may repeat.",
        MACHINE,
    )
}
COMMON = EXTENDED | {
    "skip_unreadable": Help(
        "Leave out image files that cannot be read, up to 5% of a set.", IMAGES
    ),
    "max_pixels": Help("Pixels an image file may have; default: 89 million.", IMAGES),
    "labels_from": Help("Number of the first class, where labels are numbers.", IMAGES),
    "threads": Help("Threads on the CPU; 0 leaves it to torch.", MACHINE),
}
DATA_DIR = {"data_dir": Help("Folder of downloaded sets; default: the user's cache.", IMAGES)}
RUNS = {"runs": Help("Folder of the run folders.", OUTPUT)}
FORCE = {"force": Help("Overwrite earlier results.", OUTPUT, ("-f",))}
COMPUTING = {
    "device": Help("auto (a GPU where there is one), cpu, cuda, cuda:1.", MACHINE, ("-d",)),
    "seed": Help("Seed of every random choice.", MACHINE),
}
AMP = {
    "amp": Help("Compute in bfloat16: bf16, or auto if that measures faster at the start.", MACHINE)
}
NETWORKS = {
    "preprocess": Help(
        "How images become inputs, as resize=256,crop=224; default: as the model expects them.",
        NETWORK,
    ),
    "points": Help(
        "Which coverage points, as 'layer4*' or '*:relu'; may repeat. `covcli points` lists them.",
        NETWORK,
    ),
}
ANY_LOGITS = {
    "logits": Help(
        "Where a network returns several tensors: its logits.", NETWORK, ("--logits", "--output")
    )
}
GRANULARITY = {
    "granularity": Help("channel: mean and maximum; unit: every position.", NETWORK),
}
MAX_ERROR = {
    "max_error": Help(
        "With 95% confidence, at most this share of the answers that pass is wrong; the others are "
        "unsure.",
        GUARANTEE,
    )
}
TRAINING = {
    "method": _method("Of the signature: ensemble, src, mrc, gauss, nrc or nac."),
    "epochs": Help("Passes over the training images.", WHAT, ("-e",)),
    "batch_size": Help("Images a step, of all ranks.", WHAT, ("-b",)),
    "learning_rate": Help("Peak of the one-cycle schedule.", WHAT),
    "weight_decay": Help("On matrices and kernels.", WHAT),
    "confidence_threshold": Help(
        "Softmax confidence from which a correct answer is trusted.", WHAT
    ),
    "confidence_weight": Help("Weight of the penalty on untrusted activations.", WHAT),
    "signature_every": Help("Epochs between two refreshes of the running signature.", WHAT),
    "save_every": Help("Save for --resume every so many epochs, or minutes, as 10m.", WHAT),
    "model": _model("vgg19, vgg11, resnet18, torchvision:NAME or timm:NAME."),
    "pretrained": Help("Start from the library's ImageNet weights.", NETWORK),
    "trusted": _data("Images to learn.", "-t"),
    "untrusted": _data("Images to watch beside; may repeat.", "-u", attacked=True),
    "calibration_split": Help("Share of the images held out to calibrate.", IMAGES),
    "augment": Help("Of training images.", IMAGES),
    "name": Help("Name of the run folder.", OUTPUT, ("-n",)),
    **ANY_LOGITS, **NETWORKS, **AMP, **COMPUTING, **DATA_DIR, **RUNS,
}  # fmt: skip
SIGNING = {
    "checkpoint": Help("Checkpoint, or a bare state dict."),
    "method": _method("ensemble, src, mrc, gauss, …; default: as trained, or ensemble."),
    "confidence_threshold": Help("Default: as trained, or 0.9.", WHAT),
    "model": _model("For a bare state dict: its model."),
    "logits": Help("For a bare state dict, of several outputs: the logits' name.", NETWORK),
    "trusted": _data("Images to build from; default: the training images.", "-t"),
    "calibration": _data("Held-out trusted images; default: the recorded split."),
    "alpha": Help("False-alarm rate to stay below.", GUARANTEE, ("-a",)),
    "guarantee": Help(
        "marginal: in the mean over calibrations; by-class: in each predicted class; "
        "certified-overall: of this calibration, with 95% confidence; certified: and in each "
        "predicted class.",
        GUARANTEE,
    ),
    "output": Help("Signature file; default: beside the checkpoint.", OUTPUT, ("-o",)),
    "mergeable": Help(
        "Keep what merge-signatures needs; a file of ensemble or gauss is much larger then.", OUTPUT
    ),
    **GRANULARITY, **NETWORKS, **MAX_ERROR, **AMP, **COMPUTING, **DATA_DIR, **FORCE, **RUNS,
}  # fmt: skip
MERGING = {
    "parts": Help("Signatures of one network, of different images."),
    "checkpoint": Help(
        "Their network; default: checkpoint.pt beside the first.", NETWORK, ("-c",)
    ),
    "calibration": _data(
        "Their calibration images; needed if they lie in a path and somebody else built the parts."
    ),
    "output": Help("The merged signature's file.", OUTPUT, ("-o",)),
    **COMPUTING, **DATA_DIR, **FORCE,
}  # fmt: skip
MEASURED = {
    "checkpoint": Help(
        "Default: the newest run's, or the signature's neighbour.", NETWORK, ("-c",)
    ),
    "signature": Help("Default: the newest beside the checkpoint.", NETWORK, ("-s",)),
    "method": _method("Take the newest signature of this method.", NETWORK),
    "alpha": Help(
        "False-alarm rate to stay below; default: the signature's.", GUARANTEE, ("-a",)
    ),
    "guarantee": Help("In which sense, see build-signature; default: the signature's.", GUARANTEE),
    **MAX_ERROR,
}  # fmt: skip
EVALUATING = {
    "explain": Help("How many images of each set to explain, most suspicious first.", WHAT),
    "baselines": Help(
        "Detector of pytorch-ood to compare with, or all; may repeat.",
        WHAT,
        ("--baseline",),
        "NAME",
        completes=completes("baselines"),
    ),
    "model": _model("For bare weights; the signature knows it already."),
    "untrusted": _data(
        "Untrusted images: data, noise:… or attack:…; may repeat.", "-u", attacked=True
    ),
    "trusted": _data("Trusted test images; default: the trained set's test split.", "-t"),
    "output": Help("Folder of the results; default: the signature's.", OUTPUT, ("-o",)),
    **MEASURED, **COMPUTING, **DATA_DIR, **FORCE, **RUNS,
}  # fmt: skip
GATING = {
    "fail_under": Help(
        "auroc=0.95, auroc.low=0.95 for the interval's end, mnist:auroc=0.95 for one set: else "
        "exit 1; may repeat.",
        GUARANTEE,
    ),
    "fail_over": Help("fpr95=0.2 or false_alarm_rate.high=0.06, alike; may repeat.", GUARANTEE),
    "baseline_results": Help("Earlier evaluation.json: exit 1 if a set got worse.", GUARANTEE),
    "tolerance": Help("How much worse than the earlier evaluation, from 0 to 1.", GUARANTEE),
}
TELLING = {
    "verbose": Help("Print every table, with intervals.", OUTPUT, ("-v",)),
    "junit": Help("Write the gates as a JUnit report.", OUTPUT),
    "summary": Help("Write a Markdown summary.", OUTPUT),
    "annotations": Help("Print the gates to stderr as a workflow's commands.", OUTPUT),
}
CHECKING = {
    "images": Help("Files, folders, data as npz:…, or - for a list of files on stdin."),
    "why": Help("Name the three coverage points that tell most.", WHAT),
    "drift": Help("Watch for drift: the chance of ever raising a false alarm.", WHAT),
    "drift_state": Help("File that keeps what was seen from one call to the next.", WHAT),
    "batch_size": Help(
        "Images run at once; 1 answers each line of a list at once; 0: as evaluate.", WHAT, ("-b",)
    ),
    **{name: EVALUATING[name] for name in (
        "checkpoint", "signature", "method", "alpha", "guarantee", "max_error"
    )},
    **COMPUTING, **DATA_DIR, **RUNS,
}  # fmt: skip
CHECK_OUTPUT = EXTENDED | {
    "max_pixels": COMMON["max_pixels"],
    "threads": COMMON["threads"],
    "format": Help("Default: a table on a terminal, csv elsewhere.", OUTPUT),
    "metrics": Help("Write Prometheus text, for a node exporter.", OUTPUT),
    "fail_on": Help(
        "untrusted, unsure, unreadable or drift: exit 1 on any of these; may repeat.", GUARANTEE
    ),
    "max_share": Help(
        "Exit 1 only if more than this share is such; default: untrusted.", GUARANTEE
    ),
}
LISTING = {
    "checkpoint": Help("Checkpoint, or a bare state dict of --model."),
    "model": _model("Without a checkpoint: its points, with random weights."),
    "classes": Help("Of a network of random weights.", NETWORK),
    "every": Help("List every place that could be one.", WHAT, ("--all",)),
    **ANY_LOGITS, **NETWORKS, **GRANULARITY,
}  # fmt: skip
EXPORTING = {
    "format": Help("onnx, or torch for a torch.export program; default: by the ending.", WHAT),
    "input": Help("What the file takes: bytes, or floats that are normalised already.", WHAT),
    "calibration": _data(
        "Images to verify the file with; default: those that calibrated the signature."
    ),
    "output": Help("The file; default: monitor.onnx beside the signature.", OUTPUT, ("-o",)),
    **MEASURED, **DATA_DIR, **FORCE, **RUNS,
}  # fmt: skip
COMPARING = {
    "before": Help("A signature, an evaluation.json or a run folder."),
    "after": Help("Another one, to be held against it."),
    "fail_over": Help(
        "Exit 1 if a coverage point moved further, or a figure got worse by more: NUMBER, "
        "points=NUMBER or figures=NUMBER; may repeat.",
        GUARANTEE,
    ),
    "output": Help("Folder to write comparison.html and comparison.md into.", OUTPUT, ("-o",)),
    "seed": COMPUTING["seed"], **FORCE,
}  # fmt: skip
REPORTING = {
    "run": Help("Run folder with an evaluation; default: the newest."),
    "output": Help("Folder; default: the run's.", OUTPUT, ("-o",)),
    **FORCE, **RUNS,
}  # fmt: skip
OPTIONS: OptionTable = {
    OutputOptions: TERMINAL, PluginOptions: EXTENDED, CommonOptions: COMMON,
    TrainConfig: TRAINING, SignatureConfig: SIGNING, MergeConfig: MERGING,
    CheckConfig: CHECKING, CheckOptions: CHECK_OUTPUT,
    EvaluationConfig: EVALUATING, GateOptions: GATING, EvaluationOutput: TELLING,
    PointsOptions: LISTING, ReportOptions: REPORTING, ExportConfig: EXPORTING,
    CompareOptions: COMPARING,
    PixelOptions: {
        "mean": Help("For a bare state dict: pixel means, as 0.49,0.48,0.45.", NETWORK),
        "std": Help("For a bare state dict: pixel deviations, alike.", NETWORK),
    },
}  # fmt: skip
Resume = Annotated[
    str | None,
    typer.Option(
        help="Go on with an interrupted run: its folder or name, or latest.",
        rich_help_panel=WHAT, show_envvar=False,
    ),
]  # fmt: skip
Kind = Annotated[RegistryKind | None, typer.Argument(help="What to list; default: everything.")]
OnlyCommand = Annotated[
    str | None, typer.Argument(metavar="COMMAND", help="Of which command; default: of all.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", rich_help_panel=WHAT, show_envvar=False,
        help="Follow the settings file, as it is now, in what would need your word.",
    ),
]  # fmt: skip
Inspected = Annotated[
    Path, typer.Argument(metavar="FILE", help="A file of covcli or of torch, or a run folder.")
]
