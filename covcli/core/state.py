"""The user's secret key, with which covcli recognises the files that it wrote for this user.

A file from another person may contain anything. Records that must not be forged (which folder to
read, what was measured earlier) are sealed with a key that no other user can read.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
from pathlib import Path

KEY_BYTES = 32


def folder() -> Path | None:
    """Return covcli's private folder of this user; None if none can be created.

    It is `$XDG_STATE_HOME/covcli` or `~/.local/state/covcli`; for a user without a home, a folder
    in the directory of temporary files.
    """
    for candidate in _candidates():
        with contextlib.suppress(OSError):
            candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_private(candidate):
                return candidate
    return None


def _candidates() -> list[Path]:
    places = []
    if root := os.environ.get("XDG_STATE_HOME"):
        places.append(Path(root) / "covcli")
    with contextlib.suppress(RuntimeError):  # a user without an entry has no home
        places.append(Path.home() / ".local" / "state" / "covcli")
    with contextlib.suppress(OSError):  # no folder of temporary files can be written
        places.append(Path(tempfile.gettempdir()) / f"covcli-{_user()}")
    return places


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _is_private(path: Path) -> bool:
    """Return whether a folder or file belongs to this user, and others cannot access it."""
    status = path.lstat()
    if not hasattr(os, "geteuid"):
        return True
    ours = status.st_uid == _user() and not status.st_mode & 0o077
    return ours and (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode))


def _key() -> bytes | None:
    """Return the user's key, created on first use; None if it cannot be stored."""
    if (place := folder()) is None:
        return None
    path = place / "key"
    with contextlib.suppress(OSError):
        if not path.exists():
            draft = place / f"key.{secrets.token_hex(8)}"
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(draft, path)
            draft.unlink()
        if _is_private(path) and len(key := path.read_bytes()) == KEY_BYTES:
            return key
    return None


def seal(*words: str) -> str:
    """Return an HMAC of some words that only this user's covcli can compute; "" without a key.

    Examples
    --------
    >>> holds(seal("folder:photos", "1234"), "folder:photos", "1234")
    True
    >>> holds(seal("folder:photos", "1234"), "folder:private", "1234")
    False
    """
    if (key := _key()) is None:
        return ""
    return hmac.new(key, json.dumps(words).encode(), hashlib.sha256).hexdigest()


def holds(claimed: object, *words: str) -> bool:
    """Return whether `claimed` is this user's seal of those words."""
    expected = seal(*words)
    return (
        bool(expected)
        and isinstance(claimed, str)
        and hmac.compare_digest(claimed.encode(errors="replace"), expected.encode())
    )
