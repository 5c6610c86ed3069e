"""Files that are written whole or not at all, hashed, locked, and that do not lead out of their folder."""
import contextlib
import hashlib
import os
import sys
from pathlib import Path


class DataError(OSError):
    """Data that is missing or cannot be trained on; the message names the file and the remedy."""


def check_inside(path: Path) -> None:
    """Raise DataError if `path` is a link out of its folder or is not a regular file.

    A folder from elsewhere must not lead anywhere else. The hub's cache may: in its snapshots/COMMIT/, and in the
    folders there, files are links to blobs/.
    """
    folders, target = [path.parent], Path(os.path.realpath(path))
    for parent in Path(os.path.abspath(path)).parents[1:]:
        if parent.name == "snapshots":
            folders.append(parent.with_name("blobs"))
    if not any(target.is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise DataError(f"{path} is a link to another folder, {target}: put the file itself there")
    if (path.is_symlink() or path.exists()) and not path.is_file():
        raise DataError(f"{path} is not a file: move it away")


class CheckpointError(OSError):
    """A checkpoint or model that cannot be written, or is not whole; the message names the file."""


def first_line(error: Exception) -> str:
    """Return what an exception says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def atomic_write(path: Path):
    """Give a file to write bytes to, which becomes `path` at the end.

    At any instant `path` is what it was before or the whole new file: the bytes go to a temporary file beside it, which
    is fsynced and then renamed. After an error the temporary file is deleted and `path` is left as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open_new(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def open_new(path: Path):
    """Open a new file for writing bytes. An old one goes first: it may be a link that leads elsewhere."""
    if path.is_dir() and not path.is_symlink():
        raise DataError(f"{path} is a folder, where a temporary file has to be written: move it away")
    path.unlink(missing_ok=True)
    return open(path, "xb")


def replace(temporary: Path, path: Path) -> None:
    """Rename a file that has been fsynced, and fsync the folder so that the name survives a power cut too."""
    os.replace(temporary, path)
    if os.name == "posix":  # other systems cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sha256(path: Path) -> str:
    """Return the hash of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder, busy: str, remedy: str, name: str = ".lock", seconds: float = 0):
    """Create `folder` and hold it, so that no other process writes the same files; yields the folder.

    Raises OSError, "{busy} {folder}: wait for it, or {remedy}", if a live process still holds it after `seconds`, and
    OSError if the folder cannot be written to. The operating system drops the lock when the process ends, however it
    ends. A folder that was created for it is removed again if nothing has been written to it.
    """
    import filelock

    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / name)
        try:
            held.acquire(timeout=0)
        except filelock.Timeout:
            if seconds == 0:
                raise
            print(f"{busy} {folder}: waiting for it", file=sys.stderr, flush=True)
            held.acquire(timeout=seconds)
    except filelock.Timeout as error:
        raise OSError(f"{busy} {folder}: wait for it, or {remedy}") from error
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}: {remedy}") from error
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            if is_new and not seconds and os.listdir(folder) == [name]:  # nobody waits for this lock
                os.unlink(folder / name)
                folder.rmdir()
        held.release()
