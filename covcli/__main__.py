"""Run the command line with `python -m covcli`."""

from covcli.cli import main

if __name__ == "__main__":
    main()
