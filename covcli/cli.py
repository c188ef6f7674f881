"""The commands: each parses, calls one library function, and prints.

Nothing heavy is imported before a command runs, so that `covcli --help` answers at once.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from covcli.core.choices import AugmentationChoice, GranularityChoice, Mode, RegistryKind
from covcli.core.errors import ExitCode
from covcli.core.specs import escaped
from covcli.evaluation.config import EvaluationConfig
from covcli.options import (
    Amp,
    DataDir,
    DebugFlag,
    Device,
    Force,
    JsonFlag,
    LabelsFrom,
    MaxError,
    MaxPixels,
    Plugin,
    Points,
    Preprocess,
    Process,
    QuietFlag,
    Runs,
    Seed,
    SkipUnreadable,
    Threads,
    Version,
    prepare,
    read_images,
    setting,
)
from covcli.signature.config import MergeConfig, SignatureConfig, read_statistics
from covcli.training.config import TrainConfig

app = typer.Typer(
    name="covcli",
    help="Tell which answers of an image classifier can be trusted, by coverage analysis.",
    epilog="Exit codes: 0 done, 1 a gate failed, 2 bad usage or input, 3 internal error, "
    "130 or 143 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def root(version: Version = False) -> None:
    """Tell which answers of an image classifier can be trusted, by coverage analysis."""


def _print(process: Process, result: Any, path: Path, json: bool) -> None:
    """Print what a command made: its path, or all of the result; the first rank does."""
    from covcli.core.output import write_path
    from covcli.reporting.terminal import print_json

    if process.prints and json:
        print_json(result)
    elif process.prints:
        write_path(path)


@app.command()
def train(
    method: Annotated[
        str, typer.Option(help="Of the signature: ensemble, src, mrc, gauss, nrc or nac.")
    ] = TrainConfig.method,
    trusted: Annotated[
        str, typer.Option(parser=escaped, help="Images to learn.")
    ] = TrainConfig.trusted,
    untrusted: Annotated[
        list[str] | None, typer.Option(parser=escaped, help="Images to watch beside; may repeat.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="vgg19, vgg11, resnet18, torchvision:NAME or timm:NAME.")
    ] = TrainConfig.model,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the library's ImageNet weights.")
    ] = TrainConfig.pretrained,
    preprocess: Preprocess = TrainConfig.preprocess,
    logits: Annotated[
        str,
        typer.Option(
            "--logits", "--output", help="Where a network returns several tensors: its logits."
        ),
    ] = TrainConfig.logits,
    epochs: Annotated[
        int, setting(TrainConfig, "epochs", "Passes over the training images.")
    ] = TrainConfig.epochs,
    batch_size: Annotated[
        int, setting(TrainConfig, "batch_size", "Images a step, of all ranks.")
    ] = TrainConfig.batch_size,
    learning_rate: Annotated[
        float, setting(TrainConfig, "learning_rate", "Peak of the one-cycle schedule.")
    ] = TrainConfig.learning_rate,
    weight_decay: Annotated[
        float, setting(TrainConfig, "weight_decay", "On matrices and kernels.")
    ] = TrainConfig.weight_decay,
    confidence_threshold: Annotated[
        float,
        setting(
            TrainConfig,
            "confidence_threshold",
            "Softmax confidence from which a correct answer is trusted.",
        ),
    ] = TrainConfig.confidence_threshold,
    confidence_weight: Annotated[
        float,
        setting(
            TrainConfig, "confidence_weight", "Weight of the penalty on untrusted activations."
        ),
    ] = TrainConfig.confidence_weight,
    signature_every: Annotated[
        int,
        setting(
            TrainConfig, "signature_every", "Epochs between two refreshes of the running signature."
        ),
    ] = TrainConfig.signature_every,
    calibration_split: Annotated[
        float,
        setting(TrainConfig, "calibration_split", "Share of the images held out to calibrate."),
    ] = TrainConfig.calibration_split,
    save_every: Annotated[
        str, typer.Option(help="Save for --resume every so many epochs, or minutes, as 10m.")
    ] = TrainConfig.save_every,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on with an interrupted run: its folder or name, or latest."),
    ] = None,
    augment: Annotated[
        AugmentationChoice, typer.Option(help="Of training images.")
    ] = TrainConfig.augment,
    points: Points = None,
    amp: Amp = TrainConfig.amp,
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = TrainConfig.name,
    runs: Runs = TrainConfig.runs,
    data_dir: DataDir = TrainConfig.data_dir,
    skip_unreadable: SkipUnreadable = False,
    max_pixels: MaxPixels = None,
    labels_from: LabelsFrom = 0,
    device: Device = TrainConfig.device,
    threads: Threads = 0,
    seed: Seed = TrainConfig.seed,
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Train a network with the ConfidenceLoss; print the checkpoint's path."""
    config = TrainConfig(
        method=method, trusted=trusted, untrusted=tuple(untrusted or ()), model=model,
        pretrained=pretrained, preprocess=preprocess, logits=logits, points=tuple(points or ()),
        epochs=epochs,
        batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, confidence_threshold=confidence_threshold,
        confidence_weight=confidence_weight, signature_every=signature_every,
        calibration_split=calibration_split, save_every=save_every, augment=augment, seed=seed,
        device=device, amp=amp, name=name, runs=runs, data_dir=data_dir,
    )  # fmt: skip

    from covcli.core.progress import reporter
    from covcli.training import train as training

    process = prepare(device, seed, threads, plugin)
    read_images(skip_unreadable, max_pixels, labels_from)
    with reporter(quiet or not process.prints) as progress:
        if resume is None:
            result = training.train(config, progress, process.interrupts)
        else:
            run = training.interrupted_run(resume, runs)
            named = [trusted, *(untrusted or [])]
            result = training.resume(run, progress, data_dir, process.interrupts, named)
    if process.prints and not quiet:
        training.describe_training(result)
    _print(process, result, result.checkpoint, json)


@app.command("build-signature")
def build_signature(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, or a bare state dict.")],
    method: Annotated[
        str | None,
        typer.Option(help="ensemble, src, mrc, gauss, …; default: as trained, or ensemble."),
    ] = SignatureConfig.method,
    granularity: Annotated[
        GranularityChoice, typer.Option(help="channel: mean and maximum; unit: every position.")
    ] = SignatureConfig.granularity,
    trusted: Annotated[
        str | None,
        typer.Option(parser=escaped, help="Images to build from; default: the training images."),
    ] = SignatureConfig.trusted,
    calibration: Annotated[
        str | None,
        typer.Option(parser=escaped, help="Held-out trusted images; default: the recorded split."),
    ] = SignatureConfig.calibration,
    confidence_threshold: Annotated[
        float | None,
        setting(SignatureConfig, "confidence_threshold", "Default: as trained, or 0.9."),
    ] = SignatureConfig.confidence_threshold,
    alpha: Annotated[
        float, typer.Option(help="False-alarm rate to stay below.")
    ] = SignatureConfig.alpha,
    guarantee: Annotated[
        Mode,
        typer.Option(
            help="marginal: in the mean over calibrations; by-class: in each predicted class; "
            "certified-overall: of this calibration, with 95% confidence; certified: and in each "
            "predicted class."
        ),
    ] = SignatureConfig.guarantee,
    max_error: MaxError = SignatureConfig.max_error,
    model: Annotated[
        str | None, typer.Option(help="For a bare state dict: its model.")
    ] = SignatureConfig.model,
    mean: Annotated[
        str | None, typer.Option(help="For a bare state dict: pixel means, as 0.49,0.48,0.45.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="For a bare state dict: pixel deviations, alike.")
    ] = None,
    preprocess: Preprocess = SignatureConfig.preprocess,
    logits: Annotated[
        str, typer.Option(help="For a bare state dict, of several outputs: the logits' name.")
    ] = SignatureConfig.logits,
    points: Points = None,
    output: Annotated[
        Path | None, typer.Option(help="Signature file; default: beside the checkpoint.")
    ] = SignatureConfig.output,
    force: Force = SignatureConfig.force,
    amp: Amp = SignatureConfig.amp,
    runs: Runs = SignatureConfig.runs,
    data_dir: DataDir = SignatureConfig.data_dir,
    skip_unreadable: SkipUnreadable = False,
    max_pixels: MaxPixels = None,
    labels_from: LabelsFrom = 0,
    device: Device = SignatureConfig.device,
    threads: Threads = 0,
    seed: Seed = SignatureConfig.seed,
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Record what the neurons do on trusted images; print the signature's path."""
    config = SignatureConfig(
        checkpoint=checkpoint, method=method, granularity=granularity, trusted=trusted,
        calibration=calibration, confidence_threshold=confidence_threshold, alpha=alpha,
        guarantee=guarantee, max_error=max_error, model=model,
        statistics=read_statistics(mean, std), preprocess=preprocess, logits=logits,
        points=tuple(points or ()), runs=runs,
        data_dir=data_dir, output=output, force=force, device=device, amp=amp, seed=seed,
    )  # fmt: skip

    from covcli.core.progress import reporter
    from covcli.signature.build import build_signature, describe_signature

    process = prepare(device, seed, threads, plugin)
    read_images(skip_unreadable, max_pixels, labels_from)
    with reporter(quiet or not process.prints) as progress:
        result = build_signature(config, progress)
    if process.prints and not quiet:
        describe_signature(result)
    _print(process, result, result.path, json)


@app.command("points")
def list_points(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint, or a bare state dict of --model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Without a checkpoint: its points, with random weights.")
    ] = None,
    classes: Annotated[int, typer.Option(min=2, help="Of a network of random weights.")] = 10,
    granularity: Annotated[
        GranularityChoice, typer.Option(help="channel: mean and maximum; unit: every position.")
    ] = "channel",
    points: Points = None,
    every: Annotated[
        bool, typer.Option("--all", help="List every place that could be one.")
    ] = False,
    preprocess: Preprocess = None,
    logits: Annotated[
        str,
        typer.Option(
            "--logits", "--output", help="Where a network returns several tensors: its logits."
        ),
    ] = "",
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """List the coverage points of a network: where its activations are recorded."""
    from covcli.core.progress import reporter
    from covcli.models.listing import as_table, list_points
    from covcli.models.weights import Foreign
    from covcli.reporting import terminal

    prepare("cpu", 0, 0, plugin)
    told = Foreign(model, preprocess=preprocess, logits=logits)
    with reporter(quiet):
        found = list_points(checkpoint, told, classes, granularity, tuple(points or ()), every)
    if json:
        terminal.print_json(found)
    else:
        terminal.show_table(as_table(found))


@app.command("merge-signatures")
def merge_signatures(
    parts: Annotated[
        list[Path], typer.Argument(help="Signatures of one network, of different images.")
    ],
    output: Annotated[Path, typer.Option(help="The merged signature's file.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Their network; default: checkpoint.pt beside the first.")
    ] = MergeConfig.checkpoint,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Their calibration images; needed if they lie in a path and somebody "
            "else built the parts."
        ),
    ] = MergeConfig.calibration,
    force: Force = MergeConfig.force,
    data_dir: DataDir = MergeConfig.data_dir,
    skip_unreadable: SkipUnreadable = False,
    max_pixels: MaxPixels = None,
    labels_from: LabelsFrom = 0,
    device: Device = MergeConfig.device,
    threads: Threads = 0,
    seed: Seed = MergeConfig.seed,
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Merge signatures that were built in different places, and calibrate anew; print the path."""
    config = MergeConfig(
        parts=tuple(parts), output=output, checkpoint=checkpoint, calibration=calibration,
        data_dir=data_dir, force=force, device=device, seed=seed,
    )  # fmt: skip

    from covcli.core.progress import reporter
    from covcli.signature.build import describe_signature
    from covcli.signature.merge import merge_signatures

    process = prepare(device, seed, threads, plugin)
    read_images(skip_unreadable, max_pixels, labels_from)
    with reporter(quiet or not process.prints) as progress:
        result = merge_signatures(config, progress)
    if process.prints and not quiet:
        describe_signature(result)
    _print(process, result, result.path, json)


@app.command()
def evaluate(
    untrusted: Annotated[
        list[str],
        typer.Option(
            parser=escaped, help="Untrusted images: data, noise:… or attack:…; may repeat."
        ),
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Default: the newest run's, or the signature's neighbour.")
    ] = EvaluationConfig.checkpoint,
    signature: Annotated[
        Path | None, typer.Option(help="Default: the newest beside the checkpoint.")
    ] = EvaluationConfig.signature,
    method: Annotated[
        str | None, typer.Option(help="Take the newest signature of this method.")
    ] = EvaluationConfig.method,
    model: Annotated[
        str | None, typer.Option(help="For bare weights; the signature knows it already.")
    ] = EvaluationConfig.model,
    trusted: Annotated[
        str | None,
        typer.Option(
            parser=escaped, help="Trusted test images; default: the trained set's test split."
        ),
    ] = EvaluationConfig.trusted,
    alpha: Annotated[
        float | None,
        typer.Option(help="False-alarm rate to stay below; default: the signature's."),
    ] = EvaluationConfig.alpha,
    guarantee: Annotated[
        Mode | None,
        typer.Option(help="In which sense, see build-signature; default: the signature's."),
    ] = EvaluationConfig.guarantee,
    max_error: MaxError = EvaluationConfig.max_error,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Detector of pytorch-ood to compare with, or all; may repeat."),
    ] = None,
    explain: Annotated[
        int,
        setting(
            EvaluationConfig,
            "explain",
            "How many images of each set to explain, most suspicious first.",
        ),
    ] = EvaluationConfig.explain,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            help="auroc=0.95, auroc.low=0.95 for the interval's end, mnist:auroc=0.95 for one set: "
            "else exit 1; may repeat."
        ),
    ] = None,
    fail_over: Annotated[
        list[str] | None,
        typer.Option(help="fpr95=0.2 or false_alarm_rate.high=0.06, alike; may repeat."),
    ] = None,
    baseline_results: Annotated[
        Path | None, typer.Option(help="Earlier evaluation.json: exit 1 if a set got worse.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="How much worse than the earlier evaluation, from 0 to 1.")
    ] = 0.01,
    junit: Annotated[Path | None, typer.Option(help="Write the gates as a JUnit report.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Write a Markdown summary.")] = None,
    annotations: Annotated[
        Literal["github"] | None,
        typer.Option(help="Print the gates to stderr as a workflow's commands."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print every table, with intervals.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; default: the signature's.")
    ] = EvaluationConfig.output,
    force: Force = EvaluationConfig.force,
    runs: Runs = EvaluationConfig.runs,
    data_dir: DataDir = EvaluationConfig.data_dir,
    skip_unreadable: SkipUnreadable = False,
    max_pixels: MaxPixels = None,
    labels_from: LabelsFrom = 0,
    device: Device = EvaluationConfig.device,
    threads: Threads = 0,
    seed: Seed = EvaluationConfig.seed,
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Measure how well a signature tells untrusted images from trusted ones."""
    config = EvaluationConfig(
        untrusted=tuple(untrusted), checkpoint=checkpoint, signature=signature, method=method,
        trusted=trusted, alpha=alpha, guarantee=guarantee, max_error=max_error,
        baselines=tuple(baseline or ()), explain=explain, model=model, runs=runs,
        data_dir=data_dir, output=output, force=force, device=device, seed=seed,
    )  # fmt: skip

    from covcli.core.files import write_bytes
    from covcli.core.progress import reporter
    from covcli.data.openood import expand
    from covcli.evaluation import gates
    from covcli.evaluation.evaluate import evaluate
    from covcli.reporting import pipelines, terminal

    process = prepare(device, seed, threads, plugin)
    read_images(skip_unreadable, max_pixels, labels_from)
    config = replace(config, untrusted=expand(config.untrusted, data_dir))
    wanted = [gates.parse_gate(text) for text in fail_under or []]
    wanted += [gates.parse_gate(text, "--fail-over") for text in fail_over or []]
    if baseline_results is not None:
        wanted += gates.read_baseline(baseline_results, tolerance, config.untrusted)
    config = replace(config, gates=tuple(wanted))
    with reporter(quiet or not process.prints) as progress:
        result = evaluate(config, progress)
    if not process.prints:
        return
    if junit is not None:
        write_bytes(junit, pipelines.junit(result.gates))
    if summary is not None:
        write_bytes(summary, pipelines.summary(result).encode())
    if json:
        terminal.print_json(result)
    else:
        terminal.show_evaluation(result, verbose)
    if annotations == "github":
        sys.stderr.write(pipelines.annotations(result.gates))
    failed = [outcome for outcome in result.gates if not outcome.passed]
    for outcome in failed if annotations is None else []:
        sys.stderr.write(f"{outcome}\n")
    if failed:
        raise typer.Exit(ExitCode.GATE_FAILED)


@app.command()
def report(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder with an evaluation; default: the newest.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: the run's.")] = None,
    force: Force = False,
    runs: Runs = Path("runs"),
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write report.html and report.md; print the path of the first."""
    from covcli.core.output import write_path
    from covcli.reporting.report import report
    from covcli.reporting.terminal import print_json

    result = report(run, output, force, runs)
    if json:
        print_json(result)
    else:
        write_path(result.html)


@app.command("list")
def list_registries(
    kind: Annotated[
        RegistryKind | None, typer.Argument(help="What to list; default: everything.")
    ] = None,
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """List what covcli knows by name: a line each, with its parameters and their defaults.

    Example: covcli list methods
    """
    from covcli.monitoring.registries import list_registered
    from covcli.reporting import terminal

    prepare("cpu", 0, 0, plugin)
    result = list_registered([] if kind is None else [kind])
    if json:
        terminal.print_json(result)
    else:
        terminal.show_rows(
            [entry.row if kind is None else entry.row[1:] for entry in result.entries]
        )


@app.command("inspect")
def inspect_path(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file of covcli or of torch, or a run folder.")
    ],
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say what a checkpoint, signature, evaluation, state dict or run folder is.

    No network is built. Example: covcli inspect runs/latest
    """
    from covcli.monitoring.inspect import as_table, inspect_file
    from covcli.reporting import terminal

    result = inspect_file(path)
    if json:
        terminal.print_json(result)
    else:
        terminal.show_table(as_table(result))
