"""Which checkpoint and signature a command means: those named, or the newest of the newest run."""

from pathlib import Path
from typing import Protocol

from covcli.core import run_folders
from covcli.core.errors import CovcliError
from covcli.core.opening import exists, is_file, real
from covcli.methods import make_method


class Wish(Protocol):
    """What a command's configuration says of the two files."""

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint; None for the signature's neighbour, or the newest run's."""

    @property
    def signature(self) -> Path | None:
        """The signature; None for the newest beside the checkpoint."""

    @property
    def method(self) -> str | None:
        """Of which method the newest signature is to be; None for any."""

    @property
    def runs(self) -> Path:
        """The folder of the run folders."""


def find_files(wish: Wish) -> tuple[Path, Path]:
    """Return the checkpoint and the signature: those named, or the newest of the newest run.

    Raises
    ------
    CovcliError
        If a file that is named is not there, there is no run, or no signature beside the
        checkpoint.

    Examples
    --------
    >>> from covcli import EvaluationConfig
    >>> checkpoint, signature = find_files(EvaluationConfig(("mnist",)))  # of runs/latest
    >>> checkpoint.name, signature.name
    ('checkpoint.pt', 'signature-ensemble.safetensors')
    """
    for option, path in (("checkpoint", wish.checkpoint), ("signature", wish.signature)):
        if path is not None and not exists(path):
            raise CovcliError("no such file", where=f"--{option} {path}")
    checkpoint = wish.checkpoint or _default_checkpoint(wish)
    if wish.signature is not None:
        return checkpoint, wish.signature
    where = real(checkpoint).parent
    name = make_method(wish.method).name if wish.method else "*"
    signatures = sorted(
        where.glob(f"signature-{name}.safetensors"), key=lambda p: p.stat().st_mtime
    )
    if not signatures:
        raise CovcliError(
            "holds no signature", where=where, fix=f"run `covcli build-signature {checkpoint}`"
        )
    return checkpoint, signatures[-1]


def _default_checkpoint(wish: Wish) -> Path:
    """Return the checkpoint beside the named signature, or that of the newest run."""
    if wish.signature is not None:
        beside = real(wish.signature).parent / "checkpoint.pt"
        if is_file(beside):
            return beside
    return run_folders.newest_run(wish.runs) / "checkpoint.pt"
