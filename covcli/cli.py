"""The commands: each parses, calls one library function, and prints.

Nothing heavy is imported before a command runs, so that `covcli --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from covcli.options import (
    Amp,
    Augment,
    DataDir,
    DebugFlag,
    Device,
    Force,
    GranularityChoice,
    GuaranteeMode,
    JsonFlag,
    MaxError,
    Plugin,
    Preprocess,
    Process,
    QuietFlag,
    Runs,
    Seed,
    Threads,
    Version,
    prepare,
)

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
    ] = "ensemble",
    trusted: Annotated[str, typer.Option(help="Images to learn.")] = "cifar10",
    untrusted: Annotated[
        list[str] | None, typer.Option(help="Images to watch beside; may repeat.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="vgg19, vgg11, resnet18, torchvision:NAME or timm:NAME.")
    ] = "vgg19",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the library's ImageNet weights.")
    ] = False,
    preprocess: Preprocess = None,
    logits: Annotated[
        str,
        typer.Option(
            "--logits", "--output", help="Where a network returns several tensors: its logits."
        ),
    ] = "",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(min=2, help="Images a step, of all ranks.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak of the one-cycle schedule.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(min=0, help="On matrices and kernels.")] = 5e-4,
    confidence_threshold: Annotated[
        float,
        typer.Option(min=0, help="Softmax confidence from which a correct answer is trusted."),
    ] = 0.9,
    confidence_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the penalty on untrusted activations.")
    ] = 0.1,
    signature_every: Annotated[
        int, typer.Option(min=1, help="Epochs between two refreshes of the running signature.")
    ] = 1,
    calibration_split: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images held out to calibrate.")
    ] = 0.1,
    save_every: Annotated[
        str, typer.Option(help="Save for --resume every so many epochs, or minutes, as 10m.")
    ] = "1",
    resume: Annotated[
        str | None,
        typer.Option(help="Go on with an interrupted run: its folder or name, or latest."),
    ] = None,
    augment: Annotated[Augment, typer.Option(help="Of training images.")] = "auto",
    amp: Amp = "off",
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    runs: Runs = Path("runs"),
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Train a network with the ConfidenceLoss; print the checkpoint's path."""
    from covcli.core.progress import reporter
    from covcli.training import train as training

    process = prepare(device, seed, threads, plugin)
    config = training.TrainConfig(
        method=method, trusted=trusted, untrusted=tuple(untrusted or ()), model=model,
        pretrained=pretrained, preprocess=preprocess, logits=logits, epochs=epochs,
        batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, confidence_threshold=confidence_threshold,
        confidence_weight=confidence_weight, signature_every=signature_every,
        calibration_split=calibration_split, save_every=save_every, augment=augment, seed=seed,
        device=device, amp=amp, name=name, runs=runs, data_dir=data_dir,
    )  # fmt: skip
    with reporter(quiet or not process.prints) as progress:
        if resume is None:
            result = training.train(config, progress, process.interrupts)
        else:
            run = training.interrupted_run(resume, runs)
            result = training.resume(run, progress, data_dir, process.interrupts)
    if process.prints and not quiet:
        training.describe_training(result)
    _print(process, result, result.checkpoint, json)


@app.command("build-signature")
def build_signature(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, or a bare state dict.")],
    method: Annotated[
        str | None,
        typer.Option(help="ensemble, src, mrc, gauss, …; default: as trained, or ensemble."),
    ] = None,
    granularity: Annotated[
        GranularityChoice, typer.Option(help="channel: mean and maximum; unit: every position.")
    ] = "channel",
    trusted: Annotated[
        str | None, typer.Option(help="Images to build from; default: the training images.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Held-out trusted images; default: the recorded split.")
    ] = None,
    confidence_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Default: as trained, or 0.9.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="False-alarm rate to stay below.")] = 0.05,
    guarantee: Annotated[
        GuaranteeMode,
        typer.Option(
            help="marginal: in the mean over calibrations; by-class: in each predicted class; "
            "certified-overall: of this calibration, with 95% confidence; certified: and in each "
            "predicted class."
        ),
    ] = "marginal",
    max_error: MaxError = None,
    model: Annotated[str | None, typer.Option(help="For a bare state dict: its model.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="For a bare state dict: pixel means, as 0.49,0.48,0.45.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="For a bare state dict: pixel deviations, alike.")
    ] = None,
    preprocess: Preprocess = None,
    logits: Annotated[
        str, typer.Option(help="For a bare state dict, of several outputs: the logits' name.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="Signature file; default: beside the checkpoint.")
    ] = None,
    force: Force = False,
    amp: Amp = "off",
    runs: Runs = Path("runs"),
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Record what the neurons do on trusted images; print the signature's path."""
    from covcli.core.progress import reporter
    from covcli.models.architectures import read_statistics
    from covcli.signature.build import SignatureConfig, build_signature, describe_signature

    process = prepare(device, seed, threads, plugin)
    config = SignatureConfig(
        checkpoint=checkpoint, method=method, granularity=granularity, trusted=trusted,
        calibration=calibration, confidence_threshold=confidence_threshold, alpha=alpha,
        guarantee=guarantee, max_error=max_error, model=model,
        statistics=read_statistics(mean, std), preprocess=preprocess, logits=logits, runs=runs,
        data_dir=data_dir, output=output, force=force, device=device, amp=amp, seed=seed,
    )  # fmt: skip
    with reporter(quiet or not process.prints) as progress:
        result = build_signature(config, progress)
    if process.prints and not quiet:
        describe_signature(result)
    _print(process, result, result.path, json)


@app.command("merge-signatures")
def merge_signatures(
    parts: Annotated[
        list[Path], typer.Argument(help="Signatures of one network, of different images.")
    ],
    output: Annotated[Path, typer.Option(help="The merged signature's file.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Their network; default: checkpoint.pt beside the first.")
    ] = None,
    force: Force = False,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Merge signatures that were built in different places, and calibrate anew; print the path."""
    from covcli.core.progress import reporter
    from covcli.signature.build import describe_signature
    from covcli.signature.merge import MergeConfig, merge_signatures

    process = prepare(device, seed, threads, plugin)
    config = MergeConfig(
        parts=tuple(parts), output=output, checkpoint=checkpoint, data_dir=data_dir, force=force,
        device=device, seed=seed,
    )  # fmt: skip
    with reporter(quiet or not process.prints) as progress:
        result = merge_signatures(config, progress)
    if process.prints and not quiet:
        describe_signature(result)
    _print(process, result, result.path, json)


@app.command()
def evaluate(
    untrusted: Annotated[
        list[str], typer.Option(help="Untrusted images: data, noise:… or attack:…; may repeat.")
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Default: the newest run's, or the signature's neighbour.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="Default: the newest beside the checkpoint.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Take the newest signature of this method.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For bare weights; the signature knows it already.")
    ] = None,
    trusted: Annotated[
        str | None, typer.Option(help="Trusted test images; default: the trained set's test split.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="False-alarm rate to stay below; default: the signature's."),
    ] = None,
    guarantee: Annotated[
        GuaranteeMode | None,
        typer.Option(help="In which sense, see build-signature; default: the signature's."),
    ] = None,
    max_error: MaxError = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Detector of pytorch-ood to compare with, or all; may repeat."),
    ] = None,
    explain: Annotated[
        int,
        typer.Option(min=0, help="How many images of each set to explain, most suspicious first."),
    ] = 0,
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
        float, typer.Option(min=0, max=1, help="How much worse than the earlier evaluation.")
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
    ] = None,
    force: Force = False,
    runs: Runs = Path("runs"),
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    plugin: Plugin = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Measure how well a signature tells untrusted images from trusted ones."""
    from covcli.core.files import write_bytes
    from covcli.core.progress import reporter
    from covcli.evaluation import gates
    from covcli.evaluation.evaluate import EvaluationConfig, evaluate
    from covcli.reporting import pipelines, terminal

    process = prepare(device, seed, threads, plugin)
    wanted = [gates.parse_gate(text) for text in fail_under or []]
    wanted += [gates.parse_gate(text, "--fail-over") for text in fail_over or []]
    if baseline_results is not None:
        wanted += gates.read_baseline(baseline_results, tolerance, tuple(untrusted))
    config = EvaluationConfig(
        untrusted=tuple(untrusted), checkpoint=checkpoint, signature=signature, method=method,
        trusted=trusted, alpha=alpha, guarantee=guarantee, max_error=max_error,
        baselines=tuple(baseline or ()), explain=explain, gates=tuple(wanted), model=model,
        runs=runs,
        data_dir=data_dir, output=output, force=force, device=device, seed=seed,
    )  # fmt: skip
    with reporter(quiet or not process.prints) as progress:
        result = evaluate(config, progress)
    if not process.prints:
        return
    if json:
        terminal.print_json(result)
    else:
        terminal.show_evaluation(result, verbose)
    if junit is not None:
        write_bytes(junit, pipelines.junit(result.gates))
    if summary is not None:
        write_bytes(summary, pipelines.summary(result).encode())
    if annotations == "github":
        sys.stderr.write(pipelines.annotations(result.gates))
    failed = [outcome for outcome in result.gates if not outcome.passed]
    for outcome in failed if annotations is None else []:
        sys.stderr.write(f"{outcome}\n")
    if failed:
        raise typer.Exit(1)


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
    from covcli.core.run_folders import newest_run
    from covcli.reporting.report import report
    from covcli.reporting.terminal import print_json

    result = report(run or newest_run(runs), output, force)
    if json:
        print_json(result)
    else:
        write_path(result.html)
