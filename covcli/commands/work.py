"""The frame of every command: setup of the process, progress, and output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from covcli.commands.options import CommonOptions, OutputOptions, PluginOptions
from covcli.core.errors import CovcliError, is_memory_error
from covcli.core.opening import is_file

if TYPE_CHECKING:
    from covcli.core.progress import Bar, Lines
    from covcli.core.signals import Interrupts

Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """The process of a command.

    Attributes
    ----------
    output
        The options of output.
    progress
        Reports progress.
    interrupts
        Handles signals.
    first
        Whether this process prints results: under torchrun only the first rank does.
    """

    output: OutputOptions
    progress: "Bar | Lines"
    interrupts: "Interrupts"
    first: bool

    def show(
        self, result: Result, path: Path, describe: Callable[[Result], None], then: str
    ) -> None:
        """Print a result as JSON, or only its path, to stdout; describe it on stderr.

        Parameters
        ----------
        result, path
            The result, and its main file.
        describe
            Prints a description of the result.
        then
            The command that usually comes next.
        """
        from covcli.core.output import write_path
        from covcli.reporting.terminal import print_json

        if not self.first:
            return
        if not self.output.quiet:
            describe(result)
        if self.output.json:
            print_json(result)
        else:
            write_path(path)
        self.advise(f"next: {then}")

    def advise(self, line: str) -> None:
        """Print the next step on stderr, as the last line of a run."""
        from covcli.core.output import results
        from covcli.reporting.terminal import say

        if self.first and not self.output.quiet:
            results().flush()
            say(line)


@contextmanager
def working(output: OutputOptions, device: str = "cpu", seed: int = 0) -> Iterator[Work]:
    """Set up the process for a command, and show its progress while it runs."""
    from covcli.core import distributed, runtime, signals
    from covcli.core.progress import reporter

    # Not during the imports: Python drops an exception that is raised in a callback of theirs.
    interrupts = signals.Interrupts()
    interrupts.install()
    distributed.start(device)
    runtime.configure(seed, output.threads if isinstance(output, CommonOptions) else 0)
    for plugin in output.plugin if isinstance(output, PluginOptions) else ():
        _run_plugin(plugin)
    if isinstance(output, CommonOptions):
        _read_images(output)
    first = distributed.is_first()
    with reporter(output.quiet or not first) as progress:
        yield Work(output, progress, interrupts, first)


def _run_plugin(plugin: Path) -> None:
    """Run a plugin; raise a CovcliError if it is missing or raises an error itself."""
    import runpy

    where = f"--plugin {plugin}"
    if not is_file(plugin):
        raise CovcliError("no such file", where=where)
    try:
        runpy.run_path(str(plugin))
    except CovcliError:
        raise
    except (Exception, SystemExit) as error:
        if is_memory_error(error):
            raise
        what = f"cannot be run ({type(error).__name__}: {error})"
        raise CovcliError(what, where=where, fix="--debug shows its line") from error


def _read_images(options: CommonOptions) -> None:
    """Set how this process reads image files."""
    from covcli.data import decoding, reading

    reading.configure(
        skip_unreadable=options.skip_unreadable, labels_from=options.labels_from,
        max_pixels=options.max_pixels or decoding.MAX_PIXELS,
    )  # fmt: skip
