"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the block writes there takes the place of `path` once it is on the disk.

    The file gets the permissions that the umask gives any new file.  Raises OSError, naming `path`, when it cannot be
    written; what was there before is untouched then.
    """
    # one name, not one per process: the rest that a killed run left is overwritten by the next
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as empty:
            mode = os.fstat(empty.fileno()).st_mode
        yield temporary
        temporary.chmod(mode)  # some writers make their files private
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        kept = f"; the old {path.name} is untouched" if path.exists() else ""
        raise OSError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Puts new names in the folder on the disk, so that they survive a power cut."""
    if os.name == "nt":  # no handle to a folder there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text)
