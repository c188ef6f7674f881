"""What covcli keeps for one user: a key, with which it knows its own writing again.

A file can say anything of itself. What covcli must not take a stranger's word for (which folder
to read, what was measured earlier) it seals with a key that no other user can read.
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
    """Return the folder where only this user reads and writes; None where there can be none.

    It is `$XDG_STATE_HOME/covcli` or `~/.local/state/covcli`; for a user without a home, one in the
    folder of temporary files.
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
    with contextlib.suppress(RuntimeError):  # an unknown user has no home
        places.append(Path.home() / ".local" / "state" / "covcli")
    with contextlib.suppress(OSError):  # no folder of temporary files can be written
        places.append(Path(tempfile.gettempdir()) / f"covcli-{_user()}")
    return places


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _is_private(path: Path) -> bool:
    """Return whether a folder or file is this user's, and nobody else's to read or write."""
    found = path.lstat()
    if not hasattr(os, "geteuid"):
        return True
    ours = found.st_uid == _user() and not found.st_mode & 0o077
    return ours and (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode))


def _key() -> bytes | None:
    """Return the user's key, made when it is first asked for; None where none can be kept."""
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
    """Return a seal of some words that only this user's covcli can make; "" without a key.

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
    """Return whether a seal of those words was made by this user's covcli."""
    made = seal(*words)
    return (
        bool(made)
        and isinstance(claimed, str)
        and hmac.compare_digest(claimed.encode(errors="replace"), made.encode())
    )
