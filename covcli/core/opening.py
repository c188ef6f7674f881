"""Safe opening of files: each is opened once, must be regular, and is not written through a link.

Reading a pipe, a device or a socket could block or never end. Writing through a link that an
attacker planted could overwrite another file.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Literal

from covcli.core.contents import LOOKED_AT, recognised
from covcli.core.errors import CovcliError, is_memory_error


class IrregularError(CovcliError):
    """A pipe, a device, a socket or a folder was given as a file."""


# A file may always unpack to this many bytes, and a larger one to this many times its size.
ALWAYS_ALLOWED = 64 << 20
MOST_TIMES_LARGER = 50
# Without O_NONBLOCK, opening a pipe without a writer would block for ever.
_CAREFUL = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def allowance(size: int) -> int:
    """Return the maximum unpacked size, in bytes, of a file of `size` bytes."""
    return max(ALWAYS_ALLOWED, MOST_TIMES_LARGER * size)


def kind(path: Path) -> Literal["file", "folder", "other", "nothing"]:
    """Return the kind of a path's target, with links followed.

    Raises
    ------
    CovcliError
        If the path cannot be resolved: the name is too long, a parent folder is not accessible, or
        links form a cycle.
    """
    with _followed(path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "nothing"
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def is_file(path: Path) -> bool:
    """Return whether a path names a regular file; the errors are those of `kind`."""
    return kind(path) == "file"


def is_folder(path: Path) -> bool:
    """Return whether a path names a folder; the errors are those of `kind`."""
    return kind(path) == "folder"


def exists(path: Path) -> bool:
    """Return whether a path names anything; the errors are those of `kind`."""
    return kind(path) != "nothing"


def real(path: Path) -> Path:
    """Return a path with links followed; the errors are those of `kind`."""
    with _followed(path):
        return path.resolve()


@contextmanager
def _followed(path: Path) -> Iterator[None]:
    """Convert the error of a path that cannot be resolved to a CovcliError."""
    try:
        yield
    except OSError as error:
        raise CovcliError(f"cannot be looked at ({error.strerror})", where=path) from None
    except RuntimeError:  # raised by `resolve`
        raise CovcliError("cannot be looked at (links in a circle)", where=path) from None
    except ValueError as error:  # a NUL, or a name that the file system cannot encode
        raise CovcliError(f"cannot be looked at ({error})", where=path) from None


def open_regular(path: Path, *, inside: Path | None = None) -> BufferedReader:
    """Open a regular file for reading.

    Parameters
    ----------
    path
        The file.
    inside
        A folder that the path, with links followed, must not leave.

    Raises
    ------
    IrregularError
        If it is a pipe, a device, a socket or a folder.
    CovcliError
        If it is sparse and its size far exceeds its disk blocks, or it lies outside `inside`.
    OSError
        If it cannot be opened.
    """
    if inside is not None and not real(path).is_relative_to(real(inside)):
        raise CovcliError("is a link that leaves its folder", where=path)
    handle = os.open(path, os.O_RDONLY | _CAREFUL)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise IrregularError("is no regular file", where=path)
        held = 512 * getattr(status, "st_blocks", 0)
        if status.st_size > allowance(held) and (held or _is_hole(handle)):
            raise CovcliError("claims to be far larger than it is", where=path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _is_hole(handle: int) -> bool:
    """Return whether a file stores nothing: some file systems report no blocks of any file."""
    try:
        os.lseek(handle, 0, os.SEEK_DATA)
    except (OSError, AttributeError) as error:
        return isinstance(error, OSError) and error.errno == errno.ENXIO
    os.lseek(handle, 0, os.SEEK_SET)
    return False


def open_own(path: Path) -> BufferedWriter:
    """Open one of covcli's own files for appending, creating it if needed; refuse a link.

    Raises
    ------
    CovcliError
        If the path is not a regular file, or cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _CAREFUL | _NO_LINK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        raise CovcliError(f"cannot be written ({error.strerror})", where=path) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CovcliError("is no regular file", where=path)
    return os.fdopen(handle, "wb")


def check_replaceable(path: Path) -> None:
    """Raise a CovcliError if writing a file would replace something that is not a file.

    A link itself is replaced, and its target is unchanged; so a link to a stream or a folder, such
    as `/dev/stdout`, is refused. The name "-", which elsewhere stands for a stream, is refused too.
    """
    if str(path) == "-":
        raise CovcliError("stands for no file", where=path, fix="name one")
    try:
        # `/dev/stdout` leads there, whatever it is at the moment.
        is_stream = path.is_symlink() and path.readlink().is_relative_to("/proc")
        mode = path.stat().st_mode
    except OSError:  # missing or unreachable, or a link to nothing: writing reports it
        return
    if is_stream or not stat.S_ISREG(mode):
        raise CovcliError("is no regular file and is not replaced", where=path)


def check_overwritable(path: Path, beginnings: tuple[bytes, ...], kind: str) -> None:
    """Raise a CovcliError unless a path is free, empty, or an earlier file of the same kind.

    Parameters
    ----------
    path
        The file to write.
    beginnings
        How files of the kind begin.
    kind
        What they are called.
    """
    check_replaceable(path)
    if not exists(path):
        return
    with reading(path, "cannot be read"), open_regular(path) as file:
        start = file.read(max(map(len, beginnings)))
    if start and not start.startswith(beginnings):
        raise CovcliError(f"exists and is no {kind}", where=path, fix="name another file")


def check_within(folder: Path, path: Path) -> None:
    """Raise a CovcliError if the folder of an output file, with links followed, leaves `folder`."""
    if not real(path.parent).is_relative_to(real(folder)):
        raise CovcliError("is a link that leaves its folder", where=path.parent)


@contextmanager
def reading(
    path: Path, complaint: str, fix: str | None = None, *, says: bool = False
) -> Iterator[None]:
    """Convert any error raised while a file is opened and parsed to a one-line CovcliError.

    Libraries raise dozens of error types on malformed bytes. Signals and exhausted memory are
    passed on.

    Parameters
    ----------
    path
        The file.
    complaint
        The message if the file was opened but could not be parsed.
    fix
        How the user can correct that.
    says
        Whether the message also says what the file is, if its first bytes tell.
    """
    try:
        yield
    except CovcliError:
        raise
    except FileNotFoundError:
        raise CovcliError("no such file", where=path) from None
    except OSError as error:
        raise CovcliError(f"cannot be read ({error.strerror or error})", where=path) from None
    except Exception as error:
        if is_memory_error(error):
            raise
        raise (
            misread(path, complaint, fix) if says else CovcliError(complaint, where=path, fix=fix)
        ) from None


def misread(path: Path, complaint: str, fix: str | None = None) -> CovcliError:
    """Return the error of a file that could not be parsed; it says what the file is, if known.

    Parameters
    ----------
    path
        The file.
    complaint
        What the file is not.
    fix
        The advice for a file of no known kind.
    """
    try:
        with open_regular(path) as file:
            content = recognised(file.read(LOOKED_AT))
    except (OSError, CovcliError):
        content = None
    if content is None:
        return CovcliError(complaint, where=path, fix=fix)
    return CovcliError(f"{complaint}: it is {content.what}", where=path, fix=content.cure or fix)
