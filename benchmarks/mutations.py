"""Hostile input of every kind that covcli reads, made from what it writes: structure first.

Each function makes one input from a seeded generator, so that a finding can be made again. Digests
and checksums are made right again: a stranger can compute them too.
"""

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Names that break what shows them: markup of rich, HTML, Markdown, XML and matplotlib, control
# characters, direction marks, half of a pair, and what spreadsheets run.
NAMES = [
    "[bold red]x[/]", "[/]", "[link=http://x]y[/link]", "<script>alert(1)</script>", "&amp;", "]]>",
    "[a](javascript:b)", "![x](http://y)", "a|b", "`x`", "$x^$", "$\\frac{$", "\\n", "\\", "a\nb",
    "a\r\nb", "\x00", "\x1b[31mred\x07", "\u202eevil", "\u2066x", "\ufeffx", "\ud800", "\udcff", "",
    " ", "=1+1", "@sum", "x" * 5000, "ß", "日本", "🦄", "a\tb", "%s", "{0}", "{x.__class__}", "-x",
    "--plugin=x", "nan", "None", "../../x", "/etc/passwd", "\N{FULLWIDTH SOLIDUS}",
]  # fmt: skip
# Numbers at the edge, as text: of floats and integers, and what other languages take for a number.
NUMBERS = [
    "0", "-0", "0.0", "1", "-1", "1e-320", "1e308", "1e309", "-1e309", "nan", "inf", "-inf", "NaN",
    "0x10", "1_000", "١٢", "１", "½", "1/0", "1/3", "-1/3", "0/1", "9" * 400, "1" + "0" * 5000,
    "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808",
    "1e400", "1.5", ".5", "5.", "+3", " 3", "3 ", "", "e", "True", "1e", "١e5", "0b1", "1j",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.5, 1e308, -1e308,
    5e-324, [], {}, [[]], [None], {"": None}, "", "0", "nan", [0] * 50, {"value": 1}, [{}], "x",
]  # fmt: skip


def hostile_text(chance: random.Random) -> str:
    """Return a name or a number that is hard to take."""
    return chance.choice(chance.choice([NAMES, NUMBERS]))


def any_value(chance: random.Random) -> Any:
    """Return a value at the edge of its type: a copy, which a mutation may change."""
    return deepcopy(chance.choice(VALUES))


def mutated_document(document: Any, chance: random.Random) -> Any:
    """Return a JSON document with one to three of its nodes changed, removed or repeated."""
    changed = json.loads(json.dumps(document))
    for _ in range(chance.randrange(1, 4)):
        changed = _mutate_node(changed, chance)
    return changed


def _mutate_node(document: Any, chance: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(children):
            places.append((value, key))
            if isinstance(item, dict | list):
                walk(item)

    if isinstance(document, dict | list):
        walk(document)
    if not places or chance.random() < 0.01:
        return any_value(chance)
    # Each depth as often as another: most leaves lie in long lists.
    parent, key = chance.choice(places if chance.random() < 0.5 else places[:40])
    how, old = chance.randrange(6), parent[key]
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, list):
        parent.insert(key, old)
    elif how == 2:
        parent[key] = hostile_text(chance)
    elif how == 3 and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = chance.choice([-old, old + 1, old * 1e300, -1, 0, float(old), str(old)])
    elif how == 4:
        parent[key] = chance.choice([value for _, value in _leaves(document)] or [None])
    else:
        parent[key] = any_value(chance)
    return document


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}")]
    if isinstance(value, list):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, f"{path}.{i}")]
    return [(path, value)]


def json_text(document: Any, chance: random.Random) -> bytes:
    """Return a document as text, now and then in a form that JSON does not have."""
    try:
        text = json.dumps(document, ensure_ascii=chance.random() < 0.5)
    except ValueError:
        text = "{}"
    how = chance.randrange(12)
    if how == 0:
        text = text.replace("1", chance.choice(["NaN", "Infinity", "1e999", "01", "-"]), 1)
    elif how == 1:
        text = text[: chance.randrange(len(text) + 1)]
    elif how == 2:
        text = text.replace("{", '{"schema": 1, "schema": 2, ', 1)
    elif how == 3:
        text = text.replace("[", "[" * chance.choice([2, 5000]), 1)
    return text.encode("utf-8", "surrogatepass")


def mutated_bytes(original: bytes, chance: random.Random) -> bytes:
    """Return bytes with some flipped, drawn, cut, removed, repeated or put in."""
    changed = bytearray(original)
    for _ in range(chance.choice([1, 1, 2, 5])):
        if not changed:
            break
        near = len(changed) if chance.random() < 0.4 else min(len(changed), 128)
        where = chance.randrange(near)
        how = chance.randrange(7)
        if how == 0:
            changed[where] ^= 1 << chance.randrange(8)
        elif how == 1:
            changed[where : where + 4] = chance.choice(
                [
                    b"\xff\xff\xff\xff",
                    b"\0\0\0\0",
                    b"\x7f\xff\xff\xff",
                    b"\x80\0\0\0",
                    b"\0\0\0\x01",
                ]
            )
        elif how == 2:
            changed[where : where + 8] = chance.randbytes(8)
        elif how == 3:
            del changed[where : where + chance.randrange(1, 9)]
        elif how == 4:
            changed[where:where] = chance.randbytes(chance.randrange(1, 9))
        elif how == 5:
            changed[where:where] = changed[where : where + chance.randrange(1, 200)]
        else:
            del changed[where + 1 :]
    return bytes(changed)


def image_samples() -> list[bytes]:
    """Return small images of every format and mode that covcli decodes, and of some others."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    rgba, rgb = Image.fromarray(pixels), Image.fromarray(pixels[..., :3].copy())
    grey = rgb.convert("L")
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    drawn: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "PNG", {}), (rgba, "PNG", {}), (grey, "PNG", {}), (deep, "PNG", {}),
        (rgb.quantize(5), "PNG", {"transparency": 1}), (grey.convert("1"), "PNG", {}),
        (rgb, "JPEG", {}), (grey, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "BMP", {}), (grey, "BMP", {}), (rgb.quantize(3), "BMP", {}), (rgb, "GIF", {}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgba]}), (rgb, "WEBP", {}),
        (rgba, "WEBP", {"lossless": True}), (rgb, "PPM", {}), (grey, "PPM", {}), (deep, "TIFF", {}),
        (rgb, "TIFF", {}), (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (grey.convert("1"), "TIFF", {"compression": "group4"}),
        (rgba, "TIFF", {"compression": "tiff_adobe_deflate"}), (grey.convert("F"), "TIFF", {}),
        (rgb.convert("LAB"), "TIFF", {}), (rgb, "ICO", {}), (rgb, "EPS", {}), (rgb, "TGA", {}),
    ]  # fmt: skip
    encoded = []
    for image, name, options in drawn:
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        encoded.append(buffer.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", exif=exif)
    return [*encoded, buffer.getvalue(), b"P3\n2 2\n255\n" + b"1 2 3 " * 4, b"P1\n2 2\n1 0 0 1\n"]


def mutated_image(samples: list[bytes], chance: random.Random) -> bytes:
    """Return a changed image; PNG's chunks get right lengths and sums, TIFF's tags other values."""
    original = chance.choice(samples)
    if original.startswith(b"\x89PNG") and chance.random() < 0.6:
        return _mutated_png(original, chance)
    if original[:4] in (b"II*\0", b"MM\0*") and chance.random() < 0.6:
        return _mutated_tiff(original, chance)
    if original[:1] == b"P" and chance.random() < 0.6:
        words = original[:20].split(b" ")
        words[chance.randrange(len(words))] = hostile_text(chance).encode("utf-8", "replace")
        return b" ".join(words) + original[20:]
    return mutated_bytes(original, chance)


def _mutated_png(original: bytes, chance: random.Random) -> bytes:
    chunks, at = [], 8
    while at < len(original):
        length = int.from_bytes(original[at : at + 4], "big")
        chunks.append([original[at + 4 : at + 8], original[at + 8 : at + 8 + length]])
        at += 12 + length
    chunk = chance.choice(chunks)
    how = chance.randrange(6)
    if how == 0:
        chunk[1] = mutated_bytes(chunk[1], chance)
    elif how == 1:
        chunk[0] = chance.choice([b"IDAT", b"PLTE", b"tRNS", b"IEND", b"iCCP", b"eXIf", b"acTL",
                                  b"fcTL", b"zTXt", b"iTXt", chance.randbytes(4)])  # fmt: skip
    elif how == 2:
        chunks.insert(chance.randrange(len(chunks)), list(chance.choice(chunks)))
    elif how == 3:
        chunks.remove(chunk)
    elif how == 4:
        text = zlib.compress(bytes(chance.choice([10, 10**7])))
        kind = chance.choice([b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"IDAT"])
        chunks.insert(1, [kind, b"x\0\0" + text])
    else:
        header = bytearray(chunks[0][1])
        header[chance.randrange(len(header))] = chance.randrange(256)
        chunks[0][1] = bytes(header)
    out = original[:8]
    for kind, content in chunks:
        out += struct.pack(">I", len(content)) + kind + content
        out += struct.pack(">I", zlib.crc32(kind + content))
    return out


def _mutated_tiff(original: bytes, chance: random.Random) -> bytes:
    changed = bytearray(original)
    order = "<" if original[:2] == b"II" else ">"
    at = struct.unpack_from(order + "I", original, 4)[0]
    count = struct.unpack_from(order + "H", original, at)[0]
    entry = at + 2 + 12 * chance.randrange(count)
    for _ in range(chance.randrange(1, 3)):
        field, form = chance.choice([(0, "H"), (2, "H"), (4, "I"), (8, "I")])
        value = chance.choice([0, 1, 2, 3, 5, 8, 16, 257, 258, 273, 277, 279, 339, 0xFFFF,
                               2**31 - 1, 2**32 - 1, chance.randrange(2**32)])  # fmt: skip
        struct.pack_into(
            order + form, changed, entry + field, value & (2 ** (8 * struct.calcsize(form)) - 1)
        )
    return bytes(changed)


def npz_file(chance: random.Random) -> bytes:
    """Return an archive of arrays whose headers, flags and types are mostly wrong."""
    arrays: dict[str, Any] = {
        "images": np.zeros((4, 3, 3, 3), np.uint8), "labels": np.arange(4) % 2
    }  # fmt: skip
    if chance.random() < 0.4:
        names = [
            chance.choice(NAMES).replace("\ud800", "?").replace("\udcff", "?") for _ in range(2)
        ]
        arrays["classes"] = np.array(names)
    entries = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
    changed = chance.choice(list(entries))
    how = chance.randrange(10)
    if how < 5:
        entries[changed] = _wrong_npy(entries[changed], chance)
    elif how == 5:
        entries[chance.choice(["images", "x.npy", "../x.npy", "/x", "images.npy/"])] = b"x"
    elif how == 6:
        del entries[changed]
    buffer = io.BytesIO()
    method = chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2,
                            zipfile.ZIP_LZMA])  # fmt: skip
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    packed = bytearray(buffer.getvalue())
    if how == 7:
        return mutated_bytes(bytes(packed), chance)
    if how >= 8:
        _wrong_flags(packed, chance)
    return bytes(packed)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _wrong_npy(original: bytes, chance: random.Random) -> bytes:
    body = original[10 + int.from_bytes(original[8:10], "little") :]
    kind = chance.choice(["|u1", "<i8", "<f4", "|O", "u1,u1", "<U3", "|S2", "<M8[s]", "|b1", "<c8",
                          "|V3", "", "<i3", "x", 3, None, [("a", "<i4")], ("<i4", (2,)),
                          "<U" + "9" * 9, "<i" + "9" * 5000])  # fmt: skip
    shape = chance.choice([(4, 3, 3, 3), (108,), (0,), (), (-1, 108), (2**40, 2**40), (4.0,),
                           ("4",), (True,), None, 4, [4], (10**30,), (1,) * 70,
                           (4, 0, 3, 3)])  # fmt: skip
    order: Any = chance.choice([False, True, 0, None, "x"])
    header: Any = {"descr": kind, "fortran_order": order, "shape": shape}
    if chance.random() < 0.2:
        header.pop(chance.choice(list(header)))
    text = chance.choice(
        [
            repr(header),
            repr(header),
            repr(header),
            "[" * 9000,
            "{" + "'a':1," * 4000,
            "__import__('os').system('true')",
            "{'descr': '<i4'",
            "\x00",
            "1+1",
            "()",
            repr(header).replace("'", '"'),
            repr(header)[:-3],
        ]
    ).encode("latin1", "replace")
    version = chance.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x00\x00", b"\x09\x09"])
    width = "<H" if version == b"\x01\x00" else "<I"
    length = chance.choice([len(text), len(text), len(text), 0, 2, 65535, len(text) + 7])
    return b"\x93NUMPY" + version + struct.pack(width, min(length, 65535)) + text + body


def _wrong_flags(archive: bytearray, chance: random.Random) -> None:
    """Change a field of a header of a ZIP archive: flags, method, sizes, name, offset."""
    sign = chance.choice([b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"])
    places = [i for i in range(len(archive) - 4) if archive[i : i + 4] == sign]
    if not places:
        return
    at = chance.choice(places) + chance.randrange(4, 46)
    if at + 2 <= len(archive):
        archive[at : at + 2] = chance.choice([b"\x01\x00", b"\xff\xff", b"\x00\x00", b"\x08\x00",
                                           b"\x63\x00", chance.randbytes(2)])  # fmt: skip


def scores_file(original: bytes, chance: random.Random) -> bytes:
    """Return a changed table of scores, packed."""
    lines = gzip.decompress(original).decode("utf-8", "surrogateescape").split("\n")
    how = chance.randrange(5)
    if how == 0:
        return mutated_bytes(original, chance)
    row = chance.randrange(min(len(lines), 30))
    cells = lines[row].split(",")
    if how == 1:
        cells.pop(chance.randrange(len(cells)))
    else:
        cells[chance.randrange(len(cells))] = hostile_text(chance)
    lines[row] = ",".join(cells)
    if how == 4:
        lines = lines[: chance.randrange(len(lines))]
    return gzip.compress("\n".join(lines).encode("utf-8", "surrogatepass"))


def samples_file(original: bytes, chance: random.Random) -> bytes:
    """Return samples.npz with an array missing, added or of another type or shape."""
    with np.load(io.BytesIO(original)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = chance.choice(list(arrays))
    array = arrays[name]
    how = chance.randrange(5)
    if how == 0:
        del arrays[name]
    elif how == 1:
        arrays[name] = array[..., :0] if chance.random() < 0.5 else array[:-1]
    elif how == 2:
        arrays[name] = array.astype(chance.choice([np.float64, np.int8, np.bool_, np.complex64]))
    elif how == 3:
        arrays[name] = chance.choice([
            np.zeros(()), np.full((2, 2), np.nan), np.array(["x"]), array.reshape(-1), array[None],
            -array.astype(np.int64),
        ])  # fmt: skip
    else:
        return mutated_bytes(original, chance)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def table_of_images(chance: random.Random) -> bytes:
    """Return a table of image files with a cell, a row or the head that is none."""
    rows = [["path", "label"], ["good.png", "a"], ["good.png", "b"], ["good.png", "a"]]
    for _ in range(chance.randrange(1, 4)):
        row = chance.choice(rows)
        how = chance.randrange(5)
        if how == 0 and row:
            row.pop()
        elif how == 1:
            row.append(hostile_text(chance))
        elif how == 2:
            rows.remove(row)
        elif row:
            row[chance.randrange(len(row))] = hostile_text(chance)
        if not rows:
            break
    quote = chance.choice(["", '"', "'"])
    text = chance.choice(["\n", "\r\n", "\r"]).join(
        ",".join(f"{quote}{cell}{quote}" for cell in row) for row in rows
    )
    content = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(content, chance) if chance.random() < 0.2 else content


def specification(folder: Path, chance: random.Random) -> str:
    """Return a specification of data or of an attack, with parts that are none."""
    heads = ["digits", "noise:uniform", "noise:gaussian", f"npz:{folder}/x.npz", f"folder:{folder}",
             f"csv:{folder}/x.csv", "attack:pgd", "attack:fgsm", "attack:deepfool", "attack:cw",
             "attack:boundary", "attack:pgd-l2", "attack:adaptive-pgd", "digits", "npz", "folder:",
             "folder:~", "folder:~nobody-here/", "attack:", "corrupt:", "corrupt:fog",
             "corrupt:gaussian_noise", "openood:", "openood:cifar10/near/tin"]  # fmt: skip
    keys = ["split", "offset", "limit", "seed", "eps", "steps", "step", "shuffle", "first", "x",
            "labels-from", "max-pixels", "skip-unreadable", "weight", "severity", "overshoot",
            "confidence", "stepsize", "binary_search_steps", "initial_const", ""]  # fmt: skip
    text = chance.choice(heads)
    if chance.random() < 0.2:
        text += hostile_text(chance)
    text += _parameters(keys, ["train", "test", "8/255", "3", "yes"], chance)
    if text.startswith("corrupt") and chance.random() < 0.8:
        text += ("&" if "?" in text else "?") + "of=" + chance.choice(["digits", "digits?", "of="])
    return text


def _parameters(keys: list[str], good: list[str], chance: random.Random) -> str:
    pairs = []
    for _ in range(chance.randrange(4)):
        value = chance.choice([hostile_text(chance), *good])
        pairs.append(chance.choice(keys) + chance.choice(["=", "=", "=", ""]) + value)
    return "?" + "&".join(pairs) if pairs else ""


def method(chance: random.Random) -> str:
    """Return a specification of a method, with parts that are none."""
    name = chance.choice(["ensemble", "src", "mrc", "mrc-paper", "gauss", "nrc", "nac", "x"])
    keys = ["sections", "cost", "share", "direction", "bins", "steepness", "full", "classes",
            "shrinkage"]  # fmt: skip
    return name + _parameters(keys, ["10", "0.5", "all", "surprisal"], chance)


def preparation(chance: random.Random) -> str:
    """Return what --preprocess may be told, with parts that are none."""
    parts = [
        chance.choice(["resize", "crop", "interpolation", "x", ""])
        + chance.choice(["=", "=", ""])
        + chance.choice(["256", "8x8", "cover", "bicubic", hostile_text(chance), "x", "8x", "x8"])
        for _ in range(chance.randrange(1, 4))
    ]
    return ",".join(parts)


def model(chance: random.Random) -> str:
    """Return the name of a model, or of none."""
    name = chance.choice(["tiny", "vgg11", "torchvision:", "timm:", "python:", "", "timm:hf-hub:"])
    return name + chance.choice(["", hostile_text(chance)])


def configuration(chance: random.Random) -> bytes:
    """Return a covcli.toml of which keys and values are mostly none."""
    keys = ["seed", "epochs", "batch-size", "batch_size", "untrusted", "trusted", "device", "alpha",
            "learning-rate", "runs", "plugin", "force", "points", "gates", "x", '"a b"',
            '"\\u202e"', "max-pixels", "guarantee", "output", "threads"]  # fmt: skip
    literals = ["3", "0.5", "true", "[]", "{}", "[[1]]", "nan", "-inf", "1e400", "0x" + "f" * 6000,
                "9" * 6000, "1979-05-27", "07:32:00", "-0.0", "1_000", "[1, 'a']", "''",
                "{ a = 1 }", "'digits'", "['folder:/etc']", "'~x'"]  # fmt: skip
    lines = []
    for _ in range(chance.randrange(1, 8)):
        if chance.random() < 0.3:
            name = chance.choice(["train", "evaluate", "build-signature", "report", "x", "gates"])
            lines.append(chance.choice([f"[{name}]", f"[[{name}]]"]))
            continue
        text = json.dumps(hostile_text(chance), ensure_ascii=chance.random() < 0.5)
        keys_of_gates = ["metric", "set", "fail-under", "fail_over"]
        key = chance.choice([*keys, *keys_of_gates])
        lines.append(f"{key} = {chance.choice([text, *literals])}")
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutated_bytes(content, chance) if chance.random() < 0.1 else content


def argument(chance: random.Random) -> str:
    """Return what a shell can pass to a program: bytes without a NUL."""
    text = chance.choice([hostile_text(chance), method(chance), preparation(chance), model(chance)])
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def safetensors_file(original: bytes, chance: random.Random) -> bytes:
    """Return a safetensors file whose header, of the right length, says something else."""
    length = int.from_bytes(original[:8], "little")
    header = mutated_document(json.loads(original[8 : 8 + length]), chance)
    text = json_text(header, chance)
    return len(text).to_bytes(8, "little") + text + original[8 + length :]


def mutated_tree(value: Any, chance: random.Random) -> Any:
    """Return nested content of a PyTorch file with one value changed; tensors change too."""
    import torch

    flat: list[tuple[Any, Any]] = []

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            copied: Any = {key: walk(item) for key, item in node.items()}
        elif isinstance(node, list | tuple):
            copied = [walk(item) for item in node]
        else:
            return node
        flat.extend(
            (copied, key) for key in (copied if isinstance(copied, dict) else range(len(copied)))
        )
        return copied

    tree = walk(value)
    parent, key = chance.choice(flat if chance.random() < 0.5 else flat[-20:])
    old = parent[key]
    how = chance.randrange(4)
    if how == 0 and isinstance(parent, dict):
        del parent[key]
    elif isinstance(old, torch.Tensor) and how < 3:
        changes: list[Callable[[], Any]] = [
            lambda: old.double(), lambda: old[..., :0] if old.ndim else old.reshape(1),
            lambda: old.reshape(-1), lambda: torch.full_like(old, -1), lambda: old[None],
            lambda: torch.full(old.shape, float("nan")), lambda: old.to(torch.complex64),
            lambda: torch.full(old.shape, 2**62), lambda: old.bool(),
        ]  # fmt: skip
        parent[key] = chance.choice(changes)()
    elif how == 1:
        parent[key] = hostile_text(chance)
    else:
        parent[key] = any_value(chance)
    return tree
