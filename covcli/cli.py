"""The commands: each parses, calls one library function, and prints.

Nothing heavy is imported before a command runs, so that `covcli --help` answers at once. The
settings of a command are dataclasses; `covcli.commands.options` has the help of each field.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from covcli.commands import configuration, defaults
from covcli.commands.expand import ASKS_FOR_HELP, App, defaults_of, options_of
from covcli.commands.options import (
    OPTIONS,
    CheckOptions,
    CommonOptions,
    CompareOptions,
    EvaluationOutput,
    GateOptions,
    Inspected,
    Kind,
    OnlyCommand,
    OutputOptions,
    PixelOptions,
    PluginOptions,
    PointsOptions,
    ReportOptions,
    Resume,
    Trust,
)
from covcli.commands.work import working
from covcli.core.errors import CovcliError, ExitCode
from covcli.core.specs import suggestion
from covcli.core.version import __version__
from covcli.evaluation.config import EvaluationConfig
from covcli.monitoring.config import CheckConfig
from covcli.monitoring.export_config import ExportConfig
from covcli.signature.config import MergeConfig, SignatureConfig, read_statistics
from covcli.training.config import TrainConfig

app = App(
    OPTIONS,
    name="covcli",
    help="Tell which answers of an image classifier can be trusted, by coverage analysis.",
    epilog="Exit codes: 0 done, 1 a gate failed, 2 bad usage or input, 3 internal error, "
    "129, 130 or 143 interrupted.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"covcli {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_show_version,
            is_eager=True,
            metavar="",
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """Tell which answers of an image classifier can be trusted, by coverage analysis."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        return
    group: Any = context.command
    commands = {name: options_of(command) for name, command in group.commands.items()}
    try:
        context.obj = configuration.load(commands)
    except CovcliError:
        if not context.meta[ASKS_FOR_HELP]:
            raise
        context.obj = configuration.Configuration()
    context.default_map = dict(context.obj.values)
    for line in defaults.unknown_variables(commands):
        sys.stderr.write(f"warning: {line}\n")


@app.command(
    examples="""
    covcli train --untrusted mnist
    covcli train -m resnet18 -t folder:photos/train -e 30 --name photos
    covcli train --resume photos
    """
)
def train(config: TrainConfig, common: CommonOptions, resume: Resume = None) -> None:
    """Train a network with the ConfidenceLoss; print the checkpoint's path."""
    from covcli.training import train as training

    with working(common, config.device, config.seed) as work:
        if resume is None:
            result = training.train(config, work.progress, work.interrupts)
        else:
            run = training.interrupted_run(resume, config.runs)
            named = [config.trusted, *config.untrusted]
            result = training.resume(run, work.progress, config.data_dir, work.interrupts, named)
    then = f"covcli build-signature {quote(str(result.checkpoint))}"
    work.show(result, result.checkpoint, training.describe_training, then)


@app.command(
    "build-signature",
    examples="""
    covcli build-signature runs/latest/checkpoint.pt
    covcli build-signature weights.pt -m resnet18 -t folder:photos --calibration folder:held-out
    covcli build-signature runs/latest/checkpoint.pt --alpha 0.01 --guarantee certified-overall
    """,
)
def build_signature(config: SignatureConfig, pixels: PixelOptions, common: CommonOptions) -> None:
    """Record what the neurons do on trusted images; print the signature's path."""
    config = replace(config, statistics=read_statistics(pixels.mean, pixels.std))
    from covcli.signature.build import build_signature, describe_signature

    with working(common, config.device, config.seed) as work:
        result = build_signature(config, work.progress)
    work.show(result, result.path, describe_signature, _evaluation(result.path, config.checkpoint))


@app.command(
    "points",
    examples="""
    covcli points runs/latest/checkpoint.pt
    covcli points -m torchvision:resnet50 --points 'layer4*'
    """,
)
def list_points(options: PointsOptions, output: PluginOptions) -> None:
    """List the coverage points of a network: where its activations are recorded."""
    from covcli.models.listing import as_table, list_points
    from covcli.models.weights import Foreign
    from covcli.reporting import terminal

    foreign = Foreign(options.model, preprocess=options.preprocess, logits=options.logits)
    with working(output) as work:
        result = list_points(
            options.checkpoint, foreign, options.classes, options.granularity, options.points,
            options.every,
        )  # fmt: skip
    if not work.first:
        return
    if output.json:
        terminal.print_json(result)
    else:
        terminal.show_table(as_table(result))


@app.command(
    "merge-signatures",
    examples="covcli merge-signatures part-1.safetensors part-2.safetensors -o whole.safetensors",
)
def merge_signatures(config: MergeConfig, common: CommonOptions) -> None:
    """Merge signatures that were built in different places, and calibrate anew; print the path."""
    from covcli.signature.build import describe_signature
    from covcli.signature.merge import merge_signatures

    with working(common, config.device, config.seed) as work:
        result = merge_signatures(config, work.progress)
    work.show(result, result.path, describe_signature, _evaluation(result.path, config.checkpoint))


@app.command(
    examples="""
    covcli evaluate -u mnist -u noise:uniform -u attack:pgd
    covcli evaluate -t folder:photos/test -u folder:drawings --explain 4 --baseline energy
    covcli evaluate -u mnist --fail-under auroc.low=0.95 --fail-over fpr95=0.2 --junit gates.xml
    """
)
def evaluate(
    context: typer.Context,
    config: EvaluationConfig,
    gate_options: GateOptions,
    output: EvaluationOutput,
    common: CommonOptions,
) -> None:
    """Measure how well a signature tells untrusted images from trusted ones."""
    from covcli.data.openood import expand
    from covcli.evaluation import gates
    from covcli.evaluation.evaluate import evaluate
    from covcli.reporting.pipelines import check_outputs

    check_outputs(output.junit, output.summary)
    with working(common, config.device, config.seed) as work:
        config = replace(config, untrusted=expand(config.untrusted, config.data_dir))
        wanted = gates.parse_gates(gate_options.fail_under, gate_options.fail_over)
        wanted += gates.parse_gates(context.obj.under, context.obj.over, context.obj.file)
        if gate_options.baseline_results is not None:
            wanted += gates.read_baseline(
                gate_options.baseline_results, gate_options.tolerance, config.untrusted
            )
        result = evaluate(replace(config, gates=tuple(wanted)), work.progress)
    if work.first:
        _show_evaluation(result, output, common.json)
    folder = Path(result.files["evaluation.json"]).parent
    work.advise(f"results in {folder}; next: covcli report {quote(str(folder))}")
    if not all(gate.passed for gate in result.gates):
        raise typer.Exit(ExitCode.GATE_FAILED)


def _evaluation(signature: Path, checkpoint: Path | None) -> str:
    """Return the command that evaluates a signature."""
    beside = signature.with_name("checkpoint.pt")
    network = f" -c {quote(str(checkpoint))}" if checkpoint and not beside.is_file() else ""
    return f"covcli evaluate -s {quote(str(signature))}{network} -u IMAGES"


def _show_evaluation(result: Any, output: EvaluationOutput, json: bool) -> None:
    """Write what was asked for beside an evaluation, and print it even if that fails."""
    from covcli.core.files import write_bytes
    from covcli.reporting import pipelines

    try:
        if output.junit is not None:
            write_bytes(output.junit, pipelines.junit(result.gates))
        if output.summary is not None:
            pipelines.write_summary(output.summary, result)
    finally:
        _print_evaluation(result, output, json)


def _print_evaluation(result: Any, output: EvaluationOutput, json: bool) -> None:
    from covcli.reporting import pipelines, terminal

    if json:
        terminal.print_json(result)
    else:
        terminal.show_evaluation(result, output.verbose)
    failed = [outcome for outcome in result.gates if not outcome.passed]
    if output.annotations == "github":
        sys.stderr.write(pipelines.annotations(result.gates))
    else:
        sys.stderr.write("".join(f"{outcome}\n" for outcome in failed))


@app.command(
    examples="""
    covcli check photos/ --why
    covcli check - --format jsonl --fail-on untrusted
    covcli check npz:today.npz --drift 0.01 --drift-state camera.drift --metrics covcli.prom
    """
)
def check(config: CheckConfig, options: CheckOptions) -> None:
    """Say of each image whether the network's answer can be trusted; no labels are needed."""
    from covcli.monitoring import prometheus, rows
    from covcli.monitoring.check import checking
    from covcli.monitoring.results import check_faults

    form = rows.chosen_format(options.format, options.json)
    prometheus.check_output(options.metrics, config.drift_state)
    check_faults(options.fail_on, options.max_share, config.drift is not None)
    with (
        working(options, config.device, config.seed) as work,
        checking(config, work.interrupts) as job,
    ):
        rows.show(job, form, options.metrics, work.first)
    if not work.first:
        return
    if not options.quiet:
        rows.describe(job)
    faults = job.summary().faults(options.fail_on, options.max_share)
    sys.stderr.write("".join(f"{fault}\n" for fault in faults))
    if faults:
        raise typer.Exit(ExitCode.GATE_FAILED)


@app.command(
    examples="""
    covcli report
    covcli report runs/photos -o site --force
    """
)
def report(options: ReportOptions, terminal: OutputOptions) -> None:
    """Write report.html and report.md; print the path of the first."""
    from covcli.core.output import results, write_path
    from covcli.reporting.report import report
    from covcli.reporting.terminal import print_json

    result = report(options.run, options.output, options.force, options.runs)
    if terminal.json:
        print_json(result)
    else:
        write_path(result.html)
    if not terminal.quiet:
        results().flush()
        sys.stderr.write("next: open it in a browser\n")


@app.command("list", examples="covcli list methods")
def list_registries(output: PluginOptions, kind: Kind = None) -> None:
    """List what covcli knows by name: a line each, with its parameters and their defaults."""
    from covcli.monitoring.registries import list_registered
    from covcli.reporting import terminal

    with working(output) as work:
        result = list_registered([] if kind is None else [kind])
    if not work.first:
        return
    if output.json:
        terminal.print_json(result)
    else:
        terminal.show_rows(
            [entry.row if kind is None else entry.row[1:] for entry in result.entries]
        )


@app.command(
    examples="""
    covcli config evaluate
    covcli config > covcli.toml
    covcli config --trust
    """
)
def config(
    context: typer.Context, terminal: OutputOptions, only: OnlyCommand = None, trust: Trust = False
) -> None:
    """Print the default of every option, and where it comes from."""
    import json

    from covcli.core.output import results

    if trust:
        context.obj.trust()
    group: Any = context.find_root().command
    if only is not None and only not in group.commands:
        raise CovcliError(f"unknown command {only!r}", fix=suggestion(only, [*group.commands]))
    chosen = {name: group.commands[name] for name in ([only] if only else group.commands)}
    settings = defaults.describe(
        {name: options_of(command) for name, command in chosen.items()},
        {name: defaults_of(command) for name, command in chosen.items()},
        context.obj,
    )
    if terminal.json:
        results().write(json.dumps(asdict(settings), indent=2) + "\n")
    else:
        results().write(settings.toml)


@app.command("inspect", examples="covcli inspect runs/latest")
def inspect_path(terminal: OutputOptions, path: Inspected) -> None:
    """Say what a checkpoint, signature, evaluation, state dict or run folder is.

    No network is built.
    """
    from covcli.monitoring.inspect import inspect_file
    from covcli.monitoring.inspection import as_table
    from covcli.reporting.terminal import print_json, show_table

    result = inspect_file(path)
    if terminal.json:
        print_json(result)
    else:
        show_table(as_table(result))


@app.command(
    "export",
    examples="""
    covcli export -o monitor.onnx
    covcli export -o monitor.pt2 --input normalised --alpha 0.01
    """,
)
def export_monitor(config: ExportConfig, common: CommonOptions) -> None:
    """Write network and monitor as one file that runs without covcli; print its path."""
    from covcli.monitoring.export import describe_export, export

    with working(common) as work:
        result = export(config, work.progress, work.interrupts)
    work.show(result, result.path, describe_export, f"covcli inspect {quote(str(result.path))}")


@app.command(
    "compare",
    examples="""
    covcli compare runs/old runs/new -o comparison
    covcli compare old.safetensors new.safetensors --fail-over points=0.5
    """,
)
def compare_releases(options: CompareOptions, output: OutputOptions) -> None:
    """Say what differs between two releases: coverage points, channels, classes, figures."""
    from covcli.monitoring.compare import Bounds, compare
    from covcli.monitoring.compare_report import blocks, report_comparison
    from covcli.reporting import terminal

    bounds = Bounds.parse(options.fail_over)
    with working(output, seed=options.seed) as work:
        result = compare(options.before, options.after, bounds, options.seed)
        if work.first and options.output is not None:
            report_comparison(result, options.output, options.force)
    if not work.first:
        return
    if output.json:
        terminal.print_json(result)
    else:
        terminal.show_blocks(blocks(result))
    for line in result.exceeded:
        terminal.say(f"exceeded: {line}")
    if result.exceeded:
        raise typer.Exit(ExitCode.GATE_FAILED)
