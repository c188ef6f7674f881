"""The options that several commands share, and how a command's process is set up."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covcli.core import settings
from covcli.core.choices import AmpMode
from covcli.core.errors import CovcliError
from covcli.core.opening import is_file
from covcli.core.version import __version__

if TYPE_CHECKING:
    from covcli.core.signals import Interrupts


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"covcli {__version__}\n")
        raise typer.Exit


def setting(config: type, name: str, help: str) -> Any:
    """Return the option of a configuration's field; its help ends with the field's bounds."""
    bounds = settings.bounds(config, name)
    return typer.Option(help=f"{help.removesuffix('.')}, {bounds}." if bounds else help)


Version = Annotated[
    bool,
    typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
]
Runs = Annotated[Path, typer.Option(help="Folder of the run folders.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="COVCLI_DATA_DIR", help="Folder of downloaded sets; default: the user's cache."
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1.")]
Preprocess = Annotated[
    str | None,
    typer.Option(
        help="How images become inputs, as resize=256,crop=224,interpolation=bicubic; "
        "default: as the model expects them."
    ),
]
Points = Annotated[
    list[str] | None,
    typer.Option(
        help="Which coverage points, as 'layer4*' or '*:relu'; may repeat. `covcli points` lists "
        "them."
    ),
]
Threads = Annotated[
    int, typer.Option(min=0, max=1024, help="Threads on the CPU; 0 leaves it to torch.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice, below 2^31.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Print nothing to stderr but errors.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Leave out image files that cannot be read, up to 5% of a set."
    ),
]
MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="Pixels an image file may have; default: 89 million.")
]
LabelsFrom = Annotated[
    int, typer.Option(min=0, help="Number of the first class, where labels are numbers.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite earlier results.")]
Plugin = Annotated[
    list[Path] | None,
    typer.Option(help="Python file to run first: it can register models, datasets and methods."),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        help="With 95% confidence, at most this share of the answers that pass is wrong; the "
        "others are unsure."
    ),
]
Amp = Annotated[
    AmpMode,
    typer.Option(help="Compute in bfloat16: bf16, or auto if that measures faster at the start."),
]


def read_images(skip_unreadable: bool, max_pixels: int | None = None, labels_from: int = 0) -> None:
    """Say how this process reads files of images."""
    from covcli.data import decoding, reading

    reading.configure(
        skip_unreadable=skip_unreadable, labels_from=labels_from,
        max_pixels=max_pixels or decoding.MAX_PIXELS,
    )  # fmt: skip


@dataclass(frozen=True)
class Process:
    """What a command knows of its process: where signals arrive, and whether it prints results.

    Under torchrun only the first rank prints.
    """

    interrupts: "Interrupts"
    prints: bool


def prepare(device: str, seed: int, threads: int, plugins: list[Path] | None) -> Process:
    """Set up the process for a command's work."""
    import runpy

    from covcli.core import consent, signals

    consent.ask_on_terminals()
    interrupts = signals.Interrupts()
    interrupts.install()
    from covcli.core import distributed, runtime

    distributed.start(device)
    runtime.configure(seed, threads)
    for plugin in plugins or []:
        if not is_file(plugin):
            raise CovcliError("no such file", where=f"--plugin {plugin}")
        runpy.run_path(str(plugin))
    return Process(interrupts, distributed.is_first())
