"""The entry point. It imports nothing slow before it has handled the signals."""

import os
import signal


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code.

    Until the command has begun, a signal ends the process at once. Python itself would print a
    traceback for SIGINT.
    """
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _frame: os._exit(128 + number))
    except ValueError:  # not the main thread, which alone receives signals
        pass
    from covcli.commands.boundary import run

    run(arguments)


if __name__ == "__main__":
    main()
