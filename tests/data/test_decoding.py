"""Decoding: which files become pixels, which are refused, and what a file can never do."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from covcli.core.errors import CovcliError
from covcli.data.decoding import FORMATS, decode

POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n(x) print\nshowpage\n"
)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a `gs` on the PATH that leaves a mark when it is started; return where the mark goes."""
    mark, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        program = folder / name
        program.write_text(f"#!/bin/sh\ntouch {mark}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once, then remembered
    return mark


def test_the_fake_ghostscript_is_started_where_pil_may_choose(
    tmp_path: Path, ghostscript: Path
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(OSError), Image.open(path) as image:  # noqa: PT011
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("ending", ["png", "jpg", "tiff", "eps"])
def test_postscript_never_starts_a_process_whatever_it_is_called(
    tmp_path: Path, ghostscript: Path, ending: str
) -> None:
    for i, head in enumerate((b"", b"\xc5\xd0\xd3\xc6" + bytes(26))):  # plain, and DOS EPS
        path = tmp_path / f"{i}.{ending}"
        path.write_bytes(head + POSTSCRIPT)
        with pytest.raises(CovcliError, match="of no format that covcli decodes") as caught:
            decode(path)
        assert "\n" not in str(caught.value)
    assert not ghostscript.exists()


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image = Image.fromarray(pixels)
    for name in FORMATS:
        path = tmp_path / f"{name}.png"
        image.save(path, format=name, **({"lossless": True} if name == "WEBP" else {}))
        found = decode(path)[0].permute(1, 2, 0).numpy()
        assert found.shape == pixels.shape
        if name not in ("JPEG", "GIF"):
            np.testing.assert_array_equal(found, pixels)
    for name in ("ICO", "TGA", "PCX", "SGI", "PDF", "DDS", "JPEG2000"):
        path = tmp_path / f"{name}.png"
        image.save(path, format=name)
        with pytest.raises(CovcliError, match="of no format that covcli decodes"):
            decode(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_before_a_byte_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    for path in (tmp_path / "x.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(CovcliError, match="is no regular file"):
            decode(path)
