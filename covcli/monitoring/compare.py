"""compare: the differences between two releases: their signatures and their evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from covcli.core.errors import CovcliError
from covcli.core.files import digest_file
from covcli.core.opening import is_folder, open_regular, reading
from covcli.core.specs import amount
from covcli.monitoring.changed_figures import (
    EvaluatedRelease,
    EvaluationChange,
    compare_evaluations,
)
from covcli.monitoring.changed_signatures import (
    SignatureChange,
    StoredSignature,
    compare_signatures,
)
from covcli.reporting import documents, per_image
from covcli.signature import signature as signatures

EVALUATION = "evaluation.json"
POINTS, FIGURES = "points", "figures"


@dataclass(frozen=True)
class ReleaseComparison:
    """The differences between two runs, signatures or evaluations.

    Attributes
    ----------
    before, after
        The compared paths.
    signatures, evaluations
        The differences of the signatures and of the evaluations; None if either side has none.
    exceeded
        One line for each exceeded bound.

    Examples
    --------
    >>> signature = "runs/latest/signature-ensemble.safetensors"
    >>> comparison = compare(signature, signature)
    >>> comparison.signatures.relation, comparison.signatures.largest, comparison.evaluations
    ('same', 0.0, None)
    """

    before: Path
    after: Path
    signatures: SignatureChange | None
    evaluations: EvaluationChange | None
    exceeded: list[str]


@dataclass(frozen=True)
class Bounds:
    """The largest allowed differences; None for no bound.

    Attributes
    ----------
    points
        How far a coverage point may have moved, by the first kind of distance.
    figures
        By how much a figure may have become worse.

    Examples
    --------
    >>> signature = "runs/latest/signature-ensemble.safetensors"
    >>> compare(signature, signature, Bounds(points=0.1)).exceeded
    []
    """

    points: float | None = None
    figures: float | None = None

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "Bounds":
        """Read `points=VALUE`, `figures=VALUE`, or `VALUE` for both.

        Raises
        ------
        CovcliError
            If a text has another form.

        Examples
        --------
        >>> Bounds.parse(["0.1", "figures=0.02"])
        Bounds(points=0.1, figures=0.02)
        """
        bounds: dict[str, float] = {}
        for text in sorted(texts, key=lambda text: "=" in text):  # a named bound overrides
            name, equals, value = text.rpartition("=")
            names = [name] if equals else [POINTS, FIGURES]
            try:
                if not set(names) <= {POINTS, FIGURES}:
                    raise ValueError(f"unknown name {name!r}")
                bounds |= dict.fromkeys(names, amount(value))
            except (ValueError, ZeroDivisionError):
                raise CovcliError(
                    "cannot be read", where=f"--fail-over {text}",
                    fix="write a number from 0 on, points=NUMBER or figures=NUMBER",
                ) from None  # fmt: skip
        return cls(**bounds)


def compare(
    before: str | Path, after: str | Path, bounds: Bounds = Bounds(), seed: int = 0
) -> ReleaseComparison:
    """Compare two signatures, two evaluations, or the files of two run folders.

    Parameters
    ----------
    before, after
        Signatures, `evaluation.json` files or run folders. Of two folders, the newest signatures
        with the same file name are compared; without a common name, the newest of each.
    bounds
        Bounds of the differences; `exceeded` lists those that are exceeded.
    seed
        Seed of the bootstrap for the intervals.

    Raises
    ------
    CovcliError
        If a file is missing, damaged or of another kind, or there is nothing to compare, or to
        bound.

    Examples
    --------
    >>> from covcli import SignatureConfig, build_signature, compare
    >>> halves = [
    ...     build_signature(
    ...         SignatureConfig("runs/latest/checkpoint.pt", "src", trusted=part, output=output)
    ...     ).path
    ...     for part, output in (("digits?limit=700", "a"), ("digits?offset=700", "b"))
    ... ]
    >>> compare(*halves).signatures.relation
    'data'
    """
    one, two = _Release.at(Path(before)), _Release.at(Path(after))
    signed = measured = None
    if one.signatures and two.signatures:
        signed = compare_signatures(*map(_stored, _of_one_name(one.signatures, two.signatures)))
    if one.evaluation is not None and two.evaluation is not None:
        pair = _measured(one.evaluation), _measured(two.evaluation)
        measured = compare_evaluations(*pair, seed)
    if signed is None and measured is None:
        raise CovcliError(
            f"has nothing that {before} has too", where=after,
            fix="name two signatures, two evaluations, or two run folders",
        )  # fmt: skip
    _refuse_idle(bounds, signed, measured)
    return ReleaseComparison(
        Path(before), Path(after), signed, measured, _exceeded(signed, measured, bounds)
    )


@dataclass(frozen=True)
class _Release:
    """The files of a path that can be compared: signatures, the newest last, and an evaluation."""

    signatures: list[Path]
    evaluation: Path | None

    @classmethod
    def at(cls, path: Path) -> "_Release":
        if is_folder(path):
            signature_files = sorted(
                path.glob("*.safetensors"), key=lambda file: file.stat().st_mtime
            )
            evaluation = path / EVALUATION
            if not signature_files and not evaluation.is_file():
                raise CovcliError("holds neither a signature nor an evaluation", where=path)
            return cls(signature_files, evaluation if evaluation.is_file() else None)
        with reading(path, "cannot be read"), open_regular(path) as file:
            document = file.read(9).lstrip()[:1] == b"{"
        return cls([], path) if document else cls([path], None)


def _of_one_name(before: list[Path], after: list[Path]) -> tuple[Path, Path]:
    """Return the newest signatures with the same file name; without one, the newest of each."""
    names = {path.name: path for path in before}
    for path in reversed(after):
        if path.name in names:
            return names[path.name], path
    return before[-1], after[-1]


def _stored(path: Path) -> StoredSignature:
    return StoredSignature(str(path), *signatures.load(path))


def _measured(path: Path) -> EvaluatedRelease:
    result = documents.read_evaluation(path)
    scores = path.parent / per_image.SCORES
    read = per_image.read_scores(scores) if scores.is_file() and _belongs(result, scores) else None
    return EvaluatedRelease(str(path), result, read)


def _belongs(result: documents.EvaluationResult, scores: Path) -> bool:
    """Return whether a table of scores belongs to the evaluation in the same folder."""
    recorded = result.digests.get(per_image.SCORES)
    return recorded is None or recorded == digest_file(scores)


def _refuse_idle(bounds: Bounds, signed: object, measured: object) -> None:
    """Raise a CovcliError if bounds are given, and none of them bounds anything."""
    given = {POINTS: bounds.points, FIGURES: bounds.figures}
    idle = {POINTS: signed is None, FIGURES: measured is None}
    named = [name for name, bound in given.items() if bound is not None]
    if named and all(idle[name] for name in named):
        kind = "signatures" if named[0] == POINTS else "evaluations"
        raise CovcliError(
            f"bounds nothing: there are no two {kind}",
            where=f"--fail-over {named[0]}={given[named[0]]:g}",
        )


def _exceeded(
    signed: SignatureChange | None, measured: EvaluationChange | None, bounds: Bounds
) -> list[str]:
    """Return a line for each exceeded bound, and for what it cannot be shown of."""
    lines = []
    if bounds.points is not None and signed is not None:
        change = signed.changes[0]
        lines += [
            f"{point.name} moved by {point.moved:.3g} ({change.distance}), over {bounds.points:g}"
            for point in change.points
            if not point.moved <= bounds.points
        ]
        lines += [f"{name} is only in the first signature" for name in signed.only_before]
    if bounds.figures is not None and measured is not None:
        lines += [
            f"{change.figure} of {change.set} got worse by {change.worse_by:.4f}, over "
            f"{bounds.figures:g}"
            for change in measured.figures
            if not change.worse_by <= bounds.figures
        ]
        lines += [f"{name} is only in the first evaluation" for name in measured.only_before]
    return lines
