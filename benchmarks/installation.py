"""What an installation of covcli adds to one of torch and torchvision: packages and megabytes.

    python benchmarks/installation.py
    python benchmarks/installation.py --extra attacks

Prints a Markdown table of the packages that covcli needs and torch and torchvision do not, as they
are installed in this environment, with the size of their files. --extra, which repeats, counts
what an extra adds to that. Bytecode that Python writes at the first import is left out.
"""

import argparse
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BASE = ("torch", "torchvision")


def closure(names: Sequence[str]) -> set[str]:
    """Return the packages that some requirements need, directly and through others."""
    waiting = [Requirement(name) for name in names]
    known: set[tuple[str, str]] = set()
    while waiting:
        needed = waiting.pop()
        for extra in ("", *needed.extras):
            key = (canonicalize_name(needed.name), extra)
            if key not in known:
                known.add(key)
                waiting += requirements(needed.name, extra)
    return {name for name, _ in known}


def requirements(name: str, extra: str) -> Iterator[Requirement]:
    """Yield what a package requires here; nothing if it is not installed."""
    try:
        texts = distribution(name).requires or []
    except PackageNotFoundError:
        return
    for needed in map(Requirement, texts):
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            yield needed


def size(package: Distribution) -> int:
    """Return the bytes of a package's files, without bytecode."""
    files = [file for file in package.files or [] if file.suffix != ".pyc"]
    paths = [Path(str(package.locate_file(file))) for file in files]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--extra", action="append", default=[])
    extras = parser.parse_args().extra
    plain = closure([*BASE, "covcli"])
    before = plain if extras else closure(BASE) | {"covcli"}
    added = closure([f"covcli[{','.join(extras)}]"]) - before if extras else plain - before
    rows = []
    for name in sorted(added):
        try:
            rows.append((size(distribution(name)), name, distribution(name).version))
        except PackageNotFoundError:
            raise SystemExit(f"{name} is not installed") from None
    print("| package | version | MB |\n| --- | --- | --- |")
    for amount, name, version in sorted(rows, reverse=True):
        print(f"| {name} | {version} | {amount / 1e6:.1f} |")
    print(f"| {len(rows)} packages | | {sum(row[0] for row in rows) / 1e6:.0f} |")


if __name__ == "__main__":
    main()
