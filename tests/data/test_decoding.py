"""Decoding: which files become pixels, which are refused, and what a file can never do."""

import contextlib
import io
import logging
import os
import re
import resource
import stat
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps

from covcli.core import progress
from covcli.core.errors import CovcliError
from covcli.data import decoding
from covcli.data.decoding import FORMATS, decode
from covcli.data.images import adapt

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
        decoded = decode(path)[0].permute(1, 2, 0).numpy()
        assert decoded.shape == pixels.shape
        if name not in ("JPEG", "GIF"):
            np.testing.assert_array_equal(decoded, pixels)
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


def of(path: Path) -> np.ndarray:
    return decode(path)[0].permute(1, 2, 0).numpy()


def deep(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """Write a 16-bit PNG by hand: PIL writes grey ones only."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = [row.astype(">u2").tobytes() for row in pixels]
    write_png(path, (width, height, 16, kind), rows)


def write_png(
    path: Path, head: tuple[int, int, int, int], rows: list[bytes], transparent: bytes = b""
) -> None:
    """Write a PNG by hand, from width, height, bits and colour type, and its rows of bytes."""
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    key = [(b"tRNS", transparent)] if transparent else []
    header = struct.pack(">IIBBBBB", *head, 0, 0, 0)
    parts = [(b"IHDR", header), *key, (b"IDAT", content), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ))  # fmt: skip


def write_tiff(path: Path, pixels: bytes, size: tuple[int, int], **tags: object) -> None:
    """Write a TIFF of one strip by hand, with tags that PIL does not write."""
    numbers = {"bits": 258, "photometric": 262, "samples": 277, "planar": 284, "format": 339}
    entries: dict[int, tuple[int, ...]] = {
        256: (size[0],), 257: (size[1],), 259: (1,), 273: (8,), 278: (size[1],), 279: (len(pixels),)
    }  # fmt: skip
    for name, value in tags.items():
        entries[numbers[name]] = value if isinstance(value, tuple) else (value,)  # type: ignore[assignment]
    start = 8 + len(pixels)
    body, beyond = struct.pack("<H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            place = start + 2 + 12 * len(entries) + 4 + len(beyond)
            beyond += packed
            packed = struct.pack("<I", place)
        body += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + pixels + body + bytes(4) + beyond)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_scaled_to_8(tmp_path: Path, channels: int) -> None:
    pixels = deep(5, 6, channels)
    write_png16(tmp_path / "x.png", pixels)
    decoded = of(tmp_path / "x.png").astype(int)
    if channels == 2:
        decoded = decoded[..., [0, -1]]
    assert np.abs(decoded - np.rint(pixels / 257)).max() <= 1
    exact = (deep(5, 6, channels) >> 8) * 257  # an image of 8 bits, stored in 16
    write_png16(tmp_path / "x.png", exact)
    decoded = of(tmp_path / "x.png")
    np.testing.assert_array_equal(decoded[..., [0, -1]] if channels == 2 else decoded, exact // 257)


def test_16_bit_tiff_and_pgm_are_scaled_to_8(tmp_path: Path) -> None:
    grey, colour = deep(5, 6), deep(5, 6, 3)
    size, expected = (6, 5), np.rint(deep(5, 6) / 257)
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    (tmp_path / "grey.pgm").write_bytes(b"P5 6 5 65535\n" + grey.astype(">u2").tobytes())
    write_tiff(tmp_path / "white.tif", (65535 - grey).tobytes(), size, bits=16, photometric=0)
    for name in ("grey.tif", "grey.pgm", "white.tif"):
        np.testing.assert_array_equal(of(tmp_path / name)[..., 0], expected, err_msg=name)
    write_tiff(tmp_path / "c.tif", colour.tobytes(), size, bits=(16,) * 3, photometric=2, samples=3)
    (tmp_path / "c.ppm").write_bytes(b"P6 6 5 65535\n" + colour.astype(">u2").tobytes())
    for name in ("c.tif", "c.ppm"):
        assert np.abs(of(tmp_path / name).astype(int) - np.rint(colour / 257)).max() <= 1
    twelve = grey >> 4
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in twelve.reshape(-1, 2).tolist()
    )
    write_tiff(tmp_path / "12.tif", packed, size, bits=12, photometric=1)
    np.testing.assert_array_equal(of(tmp_path / "12.tif")[..., 0], np.rint(twelve * (255 / 4095)))


def test_pixels_without_a_known_range_are_refused_with_the_reason(tmp_path: Path) -> None:
    grey, size = deep(5, 6), (6, 5)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "float.ppm").write_bytes(b"Pf 6 5 -1.0\n" + grey.astype("<f4").tobytes())
    write_tiff(tmp_path / "double.tif", grey.astype("<f8").tobytes(), size, bits=64, photometric=1,
               format=3)  # fmt: skip
    write_tiff(tmp_path / "signed.tif", grey.tobytes(), size, bits=16, photometric=1, format=2)
    write_tiff(tmp_path / "long.tif", grey.astype("<u4").tobytes(), size, bits=32, photometric=1)
    write_tiff(tmp_path / "planes.tif", deep(3, 5, 6).tobytes(), size, bits=(16,) * 3,
               photometric=2, samples=3, planar=2)  # fmt: skip
    reasons = {
        "float.tif": "float pixels have no agreed range: store 8 or 16 bits",
        "float.ppm": "float pixels have no agreed range",
        "double.tif": "a TIFF of a kind that is not decoded",
        "signed.tif": "signed pixels have no agreed range",
        "long.tif": "32-bit pixels have no agreed range",
        "planes.tif": "separate planes are not decoded",
    }
    for name, reason in reasons.items():
        with pytest.raises(CovcliError, match=reason) as caught:
            decode(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied(tmp_path: Path, form: str, orientation: int) -> None:
    image = Image.fromarray(deep(5, 7, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    image.save(tmp_path / "x", format=form, exif=exif, **options)
    with Image.open(tmp_path / "x") as opened:
        opened.load()
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(of(tmp_path / "x"), expected)
    assert expected.shape == ((7, 5, 3) if orientation in (5, 6, 7, 8) else (5, 7, 3))


def test_transparency_shows_white_whatever_the_form(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 4), np.uint8)
    image = Image.fromarray(pixels)
    alpha = pixels[..., 3:] / 255
    expected = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.webp", lossless=True, exact=True)
    image.save(tmp_path / "a.tif")
    shape = (3, 32, 32)
    for name in ("a.png", "a.webp", "a.tif"):
        adapted = adapt(decode(tmp_path / name), shape)[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(adapted, expected, err_msg=name)
    memory = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    np.testing.assert_array_equal(adapt(memory, shape)[0].permute(1, 2, 0).numpy(), expected)
    palette = Image.fromarray(pixels[..., :3]).quantize(200)
    opaque = np.random.default_rng(2).integers(0, 256, 256, np.uint8)
    palette.save(tmp_path / "p.png", transparency=opaque.tobytes())
    places = np.asarray(palette)
    colours = np.array(palette.getpalette()).reshape(-1, 3)[places]
    share = opaque[places][..., None] / 255
    adapted = adapt(decode(tmp_path / "p.png"), shape)[0].permute(1, 2, 0).numpy()
    assert np.abs(adapted - (colours * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_a_grey_png_is_found_at_every_depth(
    tmp_path: Path, bits: int
) -> None:
    highest = 2**bits - 1
    levels = np.random.default_rng(bits).integers(0, min(highest, 20) + 1, (8, 16))
    key = int(levels[0, 0])
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in levels]
    else:
        each = (levels[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in each]
    write_png(tmp_path / "x.png", (16, 8, bits, 0), rows, struct.pack(">H", key))
    expected = np.where(levels == key, 255, np.rint(levels * 255 / highest))
    adapted = adapt(decode(tmp_path / "x.png"), (1, 8, 16))[0, 0].numpy()
    np.testing.assert_array_equal(adapted, expected)


def test_a_bitmap_whose_fourth_byte_is_empty_shows_its_colours(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    for opacity, shown in ((0, colours), (255, colours), (51, 204 + np.rint(colours / 5))):
        pixels = np.dstack([colours[..., ::-1], np.full((5, 7), opacity, np.uint8)])[::-1]
        masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        head = struct.pack("<IiiHHIIiiII", 108, 7, 5, 1, 32, 3, pixels.nbytes, 0, 0, 0, 0)
        body = head + masks + bytes(52) + pixels.tobytes()
        start = struct.pack("<IHHI", 14 + len(body), 0, 0, 122)
        (tmp_path / "x.bmp").write_bytes(b"BM" + start + body)
        adapted = adapt(decode(tmp_path / "x.bmp"), (3, 5, 7))[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(adapted, shown)


def test_a_file_that_is_no_image_is_called_what_it_is(tmp_path: Path) -> None:
    for content, what in ((b"", "empty"), (b"<html>", "a web page"), (b"\0" * 99, "zeros"),
                          (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
                          (b"\0\0\0\x18ftypheic", "HEIC")):  # fmt: skip
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(CovcliError, match=what):
            decode(tmp_path / "x.jpg")


def test_other_colour_spaces_become_rgb(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), 2)
    image = Image.fromarray(pixels)
    for mode, name, near in (
        ("CMYK", "c.tif", 0), ("CMYK", "c.jpg", 8), ("LAB", "l.tif", 5), ("YCbCr", "y.jpg", 8),
        ("P", "p.png", 20), ("P", "p.gif", 20),
    ):  # fmt: skip
        image.convert(mode).save(tmp_path / name)
        decoded = of(tmp_path / name)
        assert decoded.shape == (32, 32, 3), name
        assert np.abs(decoded.astype(int) - pixels).mean() <= near, name
    for mode, name in (("1", "b.png"), ("L", "g.jpg"), ("L", "g.bmp")):
        image.convert(mode).save(tmp_path / name)
        decoded = of(tmp_path / name)[..., 0].astype(int)
        assert np.abs(decoded - np.asarray(image.convert(mode).convert("L"))).max() <= 3, name


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("L", (6, 5), value) for value in (10, 100, 200)]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert set(of(tmp_path / name)[..., 0].ravel().tolist()) == {10}, name


def test_large_and_plain_pictures_are_read(tmp_path: Path) -> None:
    Image.new("1", (4960, 7016), 1).save(tmp_path / "scan.tif", compression="group4")
    Image.new("RGB", (6000, 4000), (2, 1, 3)).save(tmp_path / "night.jpg")
    assert (tmp_path / "scan.tif").stat().st_size < 10_000
    for name, shape in (("scan.tif", (1, 1, 7016, 4960)), ("night.jpg", (1, 3, 4000, 6000))):
        assert decode(tmp_path / name).shape == shape


def test_the_limit_counts_pixels_and_can_be_raised(tmp_path: Path) -> None:
    Image.new("L", (100, 50)).save(tmp_path / "x.png")
    with pytest.raises(CovcliError, match="100×50 are more than 4999 pixels: raise --max-pixels"):
        decode(tmp_path / "x.png", 4999)
    assert decode(tmp_path / "x.png", 5000).shape == (1, 1, 50, 100)


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000), (3, 9000), (20_000, 90)])
def test_a_thin_image_costs_no_memory_and_keeps_its_middle(size: tuple[int, int]) -> None:
    width, height = size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    if width > height:
        image[..., width // 2 - 1 : width // 2 + 1] = 200  # just around the middle
    else:
        image[..., height // 2 - 1 : height // 2 + 1, :] = 200
    adapted = adapt(image, (3, 224, 224))
    assert adapted.shape == (1, 3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
    assert int(adapted[0, 0, 112, 112]) > 100
    assert torch.equal(adapted, adapted.flip(2, 3))


def test_an_image_that_is_not_thin_is_cut_after_resizing_as_ever() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 64, 900), np.uint8))
    from torchvision.transforms.v2 import functional as F

    expected = F.center_crop(F.resize(image, [32, 450], antialias=True), [32, 32])
    assert torch.equal(adapt(image, (3, 32, 32)), expected)


def broken_tiff(path: Path) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(deep(40, 50).astype(np.uint8)).convert("1").save(
        buffer, "TIFF", compression="group4"
    )
    content = bytearray(buffer.getvalue())
    content[8:60] = bytes(range(100, 152))
    path.write_bytes(content)
    return path


def many_samples(path: Path) -> Path:
    """Write a TIFF that claims 16 samples a pixel, of which PIL logs an error."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "TIFF")
    content = bytearray(buffer.getvalue())
    start = struct.unpack("<I", content[4:8])[0]
    for at in range(start + 2, start + 2 + 12 * content[start], 12):
        if struct.unpack_from("<H", content, at)[0] == 277:
            struct.pack_into("<H", content, at + 8, 16)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("broken", [broken_tiff, many_samples])
def test_libraries_of_decoders_write_nothing_by_themselves(
    tmp_path: Path, broken: Callable[[Path], Path]
) -> None:
    path = broken(tmp_path / "x.tif")
    code = (
        "import sys; from pathlib import Path; from covcli.core.errors import CovcliError\n"
        "from covcli.data.decoding import decode\n"
        "try: decode(Path(sys.argv[1]))\n"
        "except CovcliError: pass"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_decoders_warnings_are_lines_of_the_log_and_name_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "TIFF")
    content = buffer.getvalue()
    start = struct.unpack("<I", content[4:8])[0]
    # an entry of a tag nobody knows, that lies beyond the end of the file
    count = struct.unpack("<H", content[start : start + 2])[0]
    entry = struct.pack("<HHII", 65000, 2, 9, 10**6)
    changed = content[:start] + struct.pack("<H", count + 1) + content[start + 2 :]
    changed = changed[: start + 2 + 12 * count] + entry + changed[start + 2 + 12 * count :]
    path = tmp_path / "w.tif"
    path.write_bytes(changed)
    for quiet in (True, False):
        warnings.simplefilter("always")  # not once; pytest restores it
        with progress.reporter(quiet), contextlib.suppress(CovcliError):
            decode(path)
        shown = capsys.readouterr().err
        if quiet:
            assert shown == ""
        else:
            assert all(line.startswith(f"warning: {path}: ") for line in shown.splitlines())
            assert shown
    assert logging.getLogger("covcli").handlers == []


@pytest.mark.filterwarnings("ignore")
def test_every_mutated_image_decodes_or_is_refused_in_one_line(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (40, 50, 3), np.uint8))
    kinds: list[tuple[str, dict[str, object]]] = [
        *((name, {}) for name in FORMATS),
        *(("TIFF", {"compression": name}) for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")),
    ]
    for form, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        for _ in range(50):
            content = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            head = min(len(content), int(generator.choice([40, 400, len(content)])))
            places = generator.integers(0, head, int(generator.choice([1, 2, 5, 20])))
            content[places] = generator.integers(0, 256, len(places))
            length = len(content) if generator.random() < 0.8 else generator.integers(len(content))
            (tmp_path / "x").write_bytes(content[:length].tobytes())
            try:
                pixels = decode(tmp_path / "x")
            except CovcliError as error:
                assert "\n" not in str(error)
            else:
                assert pixels.dtype == torch.uint8
                assert pixels.shape[1] <= 4


def test_running_out_of_memory_is_no_broken_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.png")

    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decoding, "_pixels", exhausted)
    with pytest.raises(MemoryError):
        decode(tmp_path / "x.png")


def progressive(scans: int) -> bytes:
    """Return a progressive JPEG whose last scan, of a few bytes, is repeated."""
    stream = io.BytesIO()
    Image.new("L", (64, 64), 77).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * scans + content[-2:]


def tiled(side: int) -> bytes:
    """Return a TIFF of 16 × 16 pixels, whose only tile has the given side."""
    packed = zlib.compress(bytes([77]) * 256)
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side),
            (324, 256), (325, len(packed))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(256, b"\0") + packed


def commented(comments: int) -> bytes:
    return b"P2 16 16 255\n" + b"#\n" * comments + b"77 " * 256


@pytest.mark.parametrize(
    ("form", "few", "many", "reason"),
    [
        (progressive, 20, 2000, "more than 100 scans"),
        (tiled, 16, 12_000, "its tiles have more than 89478485 pixels"),
        (commented, 500, 500_000, "more than 1000 comments"),
    ],
)
def test_a_small_file_that_asks_for_much_work_is_refused_before_it_is_done(
    tmp_path: Path, form: Callable[[int], bytes], few: int, many: int, reason: str
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(form(few))
    assert (decode(path) == 77).all()
    path.write_bytes(form(many))
    with pytest.raises(CovcliError, match=reason):
        decode(path)


def test_scans_are_counted_as_far_as_the_image_goes() -> None:
    scan, thumbnail = b"\xff\xda\x00\x02\x11\xff\x00\xff\xd0", b"\xff\xe1\x00\x06\xff\xda\xff\xda"
    video = b"\xff\xda" * 1000  # behind the image, as phones store it
    assert decoding._scans(b"\xff\xd8" + thumbnail + 3 * scan + b"\xff\xd9" + video) == 3


def test_the_documents_name_the_formats_and_the_limit() -> None:
    root = Path(__file__).parents[2]
    page = (root / ".github" / "SECURITY.md").read_text()
    images = (root / "docs" / "images.md").read_text()
    in_page = re.search(
        r"^([\w, ]+) and (\w+) are decoded, by a file's content", page, re.MULTILINE
    )
    in_images = re.search(r"^([\w, ]+) and (\w+) are decoded, by content", images, re.MULTILINE)
    for listed in (in_page, in_images):
        assert listed is not None
        assert [*listed[1].upper().split(", "), listed[2].upper()] == list(FORMATS)
    assert f"more than {decoding.MAX_PIXELS:,} pixels" in page
