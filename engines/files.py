"""Files that are there whole or not at all."""

from __future__ import annotations

import secrets
from pathlib import Path


def write_whole(path: Path, *parts: bytes) -> None:
    """Write a file that appears whole or not at all, and that others may read if the umask lets them.

    What was there before stays until then. Raises OSError.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
