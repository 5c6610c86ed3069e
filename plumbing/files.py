"""Files that are written whole, hashed, and do not lead out of their folder."""
import hashlib
import os
from pathlib import Path


class DataError(OSError):
    """Data that is not there or cannot be trained on; the message names the file and the remedy."""


def check_inside(path: Path) -> None:
    """DataError where `path` is a link out of its folder, since a folder from elsewhere must not lead anywhere, or is
    no regular file. The hub's cache may: its snapshots/COMMIT/ are links to blobs/.
    """
    folders, target = [path.parent], Path(os.path.realpath(path))
    if path.parent.parent.name == "snapshots":
        folders.append(path.parent.parent.with_name("blobs"))
    if not any(target.is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise DataError(f"{path} is a link to another folder, {target}: put the file itself there")
    if (path.is_symlink() or path.exists()) and not path.is_file():
        raise DataError(f"{path} is not a file: move it away")


def open_new(path: Path):
    """A new file to write bytes to; one that is there, be it a link that leads elsewhere, goes first."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace(temporary: Path, path: Path) -> None:
    """Give a written and fsynced file its name, so that the name survives a power cut where folders can be opened."""
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
