"""merge_signatures: merge signatures that were built from disjoint images into one."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from covcli.core import distributed, files, run_folders, runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress, Silent
from covcli.data import datasets, labels
from covcli.data.images import DataRecord
from covcli.methods import State
from covcli.models import checkpoint as checkpoints
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureResult, save
from covcli.signature.calibration import Calibration, check_images
from covcli.signature.config import MergeConfig
from covcli.signature.fit import fit_judge
from covcli.signature.record import MergedPart, Record
from covcli.signature.signature import Signature, condensed


@dataclass(frozen=True)
class _Part:
    path: Path
    signature: Signature
    calibration: Calibration
    record: Record

    @property
    def built(self) -> tuple[MergedPart, ...]:
        """The signatures that were built: those that a merged one consists of, or itself."""
        trusted, images = self.record.trusted, self.record.trusted_images
        alone = MergedPart(files.digest_file(self.path), trusted, images)
        return self.record.parts or (alone,)


# The properties that parts must have in common, by their names in errors.
COMMON: dict[str, Callable[[_Part], Any]] = {
    "model": lambda part: (part.signature.model, part.signature.fingerprint, part.signature.points),
    "method": lambda part: part.signature.method,
    "granularity": lambda part: part.signature.granularity,
    "precision": lambda part: part.signature.precision,
    "class names": lambda part: part.signature.classes,
    "confidence threshold": lambda part: part.record.confidence_threshold,
    "calibration images": lambda part: part.record.calibration.images,
    "guarantee": lambda part: part.calibration.guarantee,
}


def merge_signatures(config: MergeConfig, progress: Progress = Silent()) -> SignatureResult:
    """Merge the states of signatures of one network, then calibrate and write the result.

    Parts of `ensemble` and `gauss` must have been built with `mergeable`. The result can be merged
    again.

    All parts must have the same calibration images, so that no part was built from them. The
    network runs over these images again. Merging is exact for src, nrc and nac; for other methods
    see their `align`.

    Parameters
    ----------
    config
        The settings.
    progress
        Receives the progress; by default it is not shown.

    Raises
    ------
    CovcliError
        If there are fewer than two parts, one does not hold what merging needs, they differ in the
        model, the method or another property that must be equal, two were built from the same
        images, a file or the data is invalid, or the output exists already or is being written.

    Examples
    --------
    >>> from covcli import MergeConfig, SignatureConfig, build_signature, merge_signatures
    >>> parts = [
    ...     build_signature(
    ...         SignatureConfig("runs/latest/checkpoint.pt", "src", trusted=half, output=output)
    ...     ).path
    ...     for half, output in (("digits?limit=700", "a"), ("digits?offset=700", "b"))
    ... ]
    >>> whole = merge_signatures(MergeConfig(parts, "whole", "runs/latest/checkpoint.pt"))
    >>> whole.images  # 1,437 without the calibration images
    1078
    """
    if len(config.parts) < 2:
        raise CovcliError("name at least two signatures", where="merge-signatures")
    if config.calibration is not None:
        datasets.check_name(config.calibration)
    output = config.output
    with run_folders.writing(output, config.force) if distributed.is_first() else nullcontext():
        return _merge(config, progress)


def _merge(config: MergeConfig, progress: Progress) -> SignatureResult:
    device = runtime.choose_device(config.device)
    parts = [_Part(path, *signatures.load(path)) for path in config.parts]
    check_parts(parts)
    first = parts[0]
    source = checkpoints.load(
        config.checkpoint or first.path.parent / "checkpoint.pt", first.signature.model
    )
    first.signature.check_model(source.model, first.path)
    model = source.model.on(device)
    model.precision = first.signature.precision
    calibrating = first.record.calibration_set(
        config.data_dir, f"name it by --calibration {first.record.calibration.spec}",
        [config.calibration],
    )  # fmt: skip
    held_out = labels.matched(calibrating, first.signature.classes).images
    guarantee = first.calibration.guarantee
    check_images(len(held_out), guarantee, len(first.signature.classes))
    sums = merged_sums([part.signature for part in parts])
    signature = condensed(first.signature, sums, model, keep=True).to(device)
    judge = fit_judge(model, signature, held_out, progress, guarantee, config.seed)
    provenance = distributed.agree(runtime.provenance(device, config.seed))
    record = merged_record(parts, provenance)
    if all(part.record.trusted.seal for part in parts):
        record = record.sealed(signature.fingerprint)
    return save(config.output, judge, record)


def check_parts(parts: Sequence[_Part]) -> None:
    """Raise a CovcliError unless parts can be merged: of one network, of different images."""
    first = parts[0]
    for i, part in enumerate(parts):
        if not part.signature.mergeable:
            raise CovcliError(
                "does not hold what merging needs",
                where=part.path,
                fix="build it again with build-signature --mergeable",
            )
        for what, look in COMMON.items():
            if look(part) != look(first):
                raise CovcliError(f"differs in {what} from {first.path}", where=part.path)
        for earlier in parts[:i]:
            known = {built.trusted.images for built in earlier.built}
            if known & {built.trusted.images for built in part.built}:
                raise CovcliError(
                    f"was built from the same images as {earlier.path}", where=part.path
                )


def merged_sums(parts: Sequence[Signature]) -> State:
    """Merge the complete states of parts that `check_parts` accepts."""
    states = [part.to_merge for part in parts]
    first, *others = parts[0].method.align([state for state in states if state is not None])
    merged = first.holding({name: tensor.clone() for name, tensor in first.tensors.items()})
    for state in others:
        merged.merge(state)
    return merged


def merged_record(parts: Sequence[_Part], provenance: dict[str, Any]) -> Record:
    """Return the record of a merged signature; its data specification is that of the first part."""
    records = [part.record for part in parts]
    first, images = records[0], sum(record.trusted_images for record in records)
    built = tuple(one for part in parts for one in part.built)
    sources = {one.trusted.source for one in built}
    return replace(
        first,
        trusted=DataRecord(
            spec=first.trusted.spec,
            source=sources.pop() if len(sources) == 1 else files.digest(sorted(sources)),
            images=files.digest([one.trusted.images for one in built]),
        ),
        trusted_images=images,
        trusted_counts=tuple(map(sum, zip(*(r.trusted_counts for r in records), strict=True))),
        relaxed_classes=tuple(sorted({k for r in records for k in r.relaxed_classes})),
        accuracy=sum(r.accuracy * r.trusted_images for r in records) / images,
        provenance=provenance,
        parts=built,
    )
