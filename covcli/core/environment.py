"""The numbers that torchrun passes to its processes by environment variables."""

import os
import re

from covcli.core.errors import CovcliError


def whole_number(name: str, default: int) -> int:
    """Return the number of an environment variable; the default if it is not set.

    Raises
    ------
    CovcliError
        If the variable is no whole number from 0 to 999,999,999.

    Examples
    --------
    >>> whole_number("NO_SUCH_VARIABLE", 1)
    1
    """
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise CovcliError(
            f"{text!r} is no number", where=name, fix="unset it, or start covcli by torchrun"
        )
    return int(text)
