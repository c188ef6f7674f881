"""The boundary: run a command, report errors in one line, and exit with an `ExitCode`."""

import logging
import os
import sys
import traceback
from typing import Any

from covcli.core import output, signals
from covcli.core.environment import whole_number
from covcli.core.errors import CovcliError, ExitCode, is_memory_error, one_line
from covcli.core.signals import Interrupted

INTERRUPTED = (ExitCode.HUNG_UP, ExitCode.INTERRUPTED, ExitCode.TERMINATED)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code; every error ends here."""
    signals.leave_at_once()
    args = list(sys.argv[1:] if arguments is None else arguments)
    if "--resume" in args and (args[args.index("--resume") + 1 :] or ["-"])[0].startswith("-"):
        args.insert(args.index("--resume") + 1, "latest")  # the default value
    output.keep()
    output.forget_wrong_sizes()
    logging.lastResort = logging.NullHandler()  # hide log lines of libraries
    with signals.watched():
        try:
            code = _run(args, "--debug" in args)
        except Interrupted as error:  # while another error was being reported
            code = _fail(error, *_describe(error), debug=False)
    if lost := output.finish():
        sys.stderr.write(f"error: {lost}\n")
        code = code or ExitCode.BAD_INPUT
    many = (ranks := _ranks()) is not None and ranks.size() > 1
    if many or (code in INTERRUPTED and arguments is None):
        sys.stderr.flush()
        os._exit(code)  # without waiting for threads or other ranks
    sys.exit(code)


def _run(args: list[str], debug: bool) -> int:
    try:
        if whole_number("WORLD_SIZE", 1) > 1:  # hide torch's warnings on each rank
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from covcli.cli import app

        returned = app(args=args, prog_name="covcli", standalone_mode=False)
        if (ranks := _ranks()) is not None:
            ranks.stop()
        signals.leave_at_once()  # from here on there is nothing to save
        return returned if isinstance(returned, int) else ExitCode.DONE
    except SystemExit as done:  # of Typer, where the shell asks for completions
        return done.code if isinstance(done.code, int) else ExitCode.DONE
    except BaseException as error:
        signals.leave_at_once()
        return _fail(error, *_describe(error), debug)


def _ranks() -> Any:
    """Return `core.distributed` if a command has imported it; importing it here is slow."""
    return sys.modules.get("covcli.core.distributed")


def _describe(error: Any) -> tuple[str, ExitCode]:
    """Return the error message for stderr, and the exit code."""
    if isinstance(error, Interrupted):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":  # Typer's
        return "interrupted", ExitCode.INTERRUPTED
    if isinstance(error, CovcliError):
        return f"error: {error}", ExitCode.BAD_INPUT
    if hasattr(error, "format_message") and getattr(error, "exit_code", None) == 2:
        command = getattr(getattr(error, "ctx", None), "command_path", "covcli")
        text = one_line(error.format_message()).removesuffix(".").replace("Value error, ", "")
        return f"error: {text}; see {command} --help", ExitCode.BAD_INPUT
    kind = type(error).__name__
    if is_memory_error(error):
        return "error: memory exhausted", ExitCode.BAD_INPUT
    if isinstance(error, OSError):  # a problem of the environment, such as a full disk
        place = "" if error.filename is None else f"{error.filename}: "
        return f"error: {one_line(f'{place}{error.strerror or error}')}", ExitCode.BAD_INPUT
    message = f"internal error: {kind}: {one_line(str(error))}; run again with --debug"
    return message, ExitCode.INTERNAL_ERROR


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if (ranks := _ranks()) is not None:
        try:
            message = ranks.worded(error, message)
        except Exception:  # torchrun ended the wait for another rank's message
            message = ""
    if message:
        sys.stderr.write(message + "\n")
    return code
