"""`openood:NAME`: the near and far sets of OpenOOD v1.5 (Zhang et al., 2023) for a benchmark.

If OpenOOD's lists of images are in the data folder (`benchmark_imglist/cifar10/test_tin.txt` beside
`images_classic` and `images_largescale`, as its download script creates them), the sets are exactly
those of the benchmark. Otherwise the whole set is used: from a folder of its name in the data
folder, or a data set of covcli. OpenOOD excludes images that show trusted classes, so results on
whole sets differ from its tables; a warning says so.
"""

from collections.abc import Sequence
from pathlib import Path

from covcli.core import file_checks
from covcli.core.errors import CovcliError
from covcli.core.opening import exists, is_file, kind
from covcli.core.specs import Spec, parse, suggestion
from covcli.data.forms import of_files, of_folder
from covcli.data.image_files import FileSource
from covcli.data.images import ImageSet, Origin
from covcli.data.reading import OF_FILES, Reading
from covcli.data.registry import DATASETS, PARTS, Request, default_data_dir, say_once

FAR_OF_SMALL = ("mnist", "svhn", "texture", "places365")
BENCHMARKS: dict[str, dict[str, tuple[str, ...]]] = {
    "cifar10": {"near": ("cifar100", "tin"), "far": FAR_OF_SMALL},
    "cifar100": {"near": ("cifar10", "tin"), "far": FAR_OF_SMALL},
    "imagenet200": {
        "near": ("ssb_hard", "ninco"),
        "far": ("inaturalist", "textures", "openimage_o"),
    },
}
# OpenOOD's names of sets that covcli can download. OpenOOD's iNaturalist is a selection of plants
# that torchvision does not have.
KNOWN = {
    "cifar10": "cifar10", "cifar100": "cifar100", "mnist": "mnist", "svhn": "svhn",
    "texture": "textures", "textures": "textures", "places365": "places365",
}  # fmt: skip
IMAGES = ("images_classic", "images_largescale")


def expand(texts: Sequence[str], data_dir: Path | None = None) -> tuple[str, ...]:
    """Return specifications with every OpenOOD group replaced by its sets.

    Parameters
    ----------
    texts
        Specifications; `openood:cifar10` and `openood:cifar10/near` are groups of several sets.
    data_dir
        The folder of downloaded sets.

    Raises
    ------
    CovcliError
        If a benchmark or a group is unknown, or none of its sets is available.

    Examples
    --------
    >>> expand(["digits", "openood:cifar10/far?limit=500"])[:2]
    ('digits', 'openood:cifar10/far/mnist?limit=500')
    """
    expanded: list[str] = []
    for text in texts:
        spec = parse(text)
        group = spec.name == "openood" and spec.argument.count("/") < 2
        expanded += _members(spec, data_dir or default_data_dir()) if group else [text]
    return tuple(dict.fromkeys(expanded))


def _members(spec: Spec, data_dir: Path) -> list[str]:
    benchmark, _, wanted = spec.argument.partition("/")
    groups = _groups(spec, benchmark)
    if wanted and wanted not in groups:
        raise CovcliError(f"unknown group {wanted!r}", where=spec.text, fix="known: near, far")
    tail = spec.text.partition("?")[2]
    members, missing = [], []
    for group in [wanted] if wanted else groups:
        for name in groups[group]:
            if _place(data_dir, benchmark, name) is None and name not in KNOWN:
                missing.append(name)
            else:
                members.append(f"openood:{benchmark}/{group}/{name}{'?' if tail else ''}{tail}")
    if missing:
        say_once(
            f"{spec.text}: left out {', '.join(missing)}: they cannot be downloaded; put "
            f"OpenOOD's data into {data_dir}, or a folder of that name"
        )
    if not members:
        raise CovcliError("none of its sets is available", where=f"{spec.text} in {data_dir}")
    return members


def _groups(spec: Spec, benchmark: str) -> dict[str, tuple[str, ...]]:
    if benchmark not in BENCHMARKS:
        fix = suggestion(benchmark, list(BENCHMARKS))
        raise CovcliError(f"unknown benchmark {benchmark!r}", where=spec.text, fix=fix)
    return BENCHMARKS[benchmark]


def _place(data_dir: Path, benchmark: str, name: str) -> Path | None:
    """Return the path of OpenOOD's list of a set, or of a folder of its name; None if missing."""
    places = [root / "benchmark_imglist" / benchmark / f"test_{name}.txt"
              for root in (data_dir, data_dir / "openood")]  # fmt: skip
    places.append(data_dir / name)
    return next((place for place in places if kind(place) in ("file", "folder")), None)


@DATASETS.add("openood")
def openood(request: Request) -> ImageSet:
    """One set of a benchmark of OpenOOD v1.5, as `openood:cifar10/near/tin`."""
    spec = request.spec
    spec.only([*PARTS, *OF_FILES])
    benchmark, _, rest = spec.argument.partition("/")
    group, _, name = rest.partition("/")
    if name not in _groups(spec, benchmark).get(group, ()):
        raise CovcliError("is not a single set", where=spec.text, fix="use it as --untrusted")
    place = _place(request.data_dir, benchmark, name)
    if place is not None and is_file(place):
        return _listed(request, place)
    if place is None and name not in KNOWN:
        raise CovcliError(
            f"is not in {request.data_dir}, and nothing fetches it by name", where=spec.text,
            fix="put OpenOOD's data there, or a folder of that name",
        )  # fmt: skip
    say_once(f"{spec.text}: the whole set, not the images that OpenOOD lists")
    if place is not None:
        return of_folder(request, place, Origin(spec.text))
    plain = parse(KNOWN[name])
    return DATASETS.get(plain.name)(Request(plain, request.split, request.folder))


def _listed(request: Request, file: Path) -> ImageSet:
    """Return the images of an OpenOOD list; each line has a path and a label, which is ignored."""
    root = file.parent.parent.parent
    lines = file_checks.read_text(file).decode("utf-8", "surrogateescape").splitlines()
    names = [line.rsplit(" ", 1)[0] for line in lines if line.strip()]
    if not names:
        raise CovcliError("names no image", where=file)
    folders = [folder for folder in IMAGES if exists(root / folder / names[0])]
    if not folders:
        raise CovcliError(
            f"{names[0]} is in neither of {', '.join(IMAGES)}", where=root,
            fix="download OpenOOD's images too",
        )  # fmt: skip
    most = Reading.of(request.spec).max_pixels
    source = FileSource(root / folders[0], names, f"{file.parent.name}/{file.name}", most)
    return of_files(request, source, None, (), Origin(request.spec.text))
