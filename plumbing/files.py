"""Files that are written whole or not at all, hashed, locked, and that do not lead out of their folder."""
import contextlib
import hashlib
import itertools
import os
import sys
from pathlib import Path

from plumbing.cli import UserError, print0
from plumbing.progress import busy


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


def walk(folder: Path):
    """Yield the files below a folder; folders that are links are entered too, each once."""
    entered = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def set_aside(path: Path, why: str) -> None:
    """Rename a file to NAME.old, or .old1 and so on, so that another can take its name, and say so.

    A link stays: what takes its name replaces it, and leaves alone what it leads to.
    """
    if path.is_symlink() or not path.exists():
        return
    names = (path.with_name(f"{path.name}.old{i or ''}") for i in itertools.count())
    older = next(name for name in names if not os.path.lexists(name))
    os.replace(path, older)
    print0(f"warning: {path} {why}: kept as {older}")


def identity(path) -> tuple[int, int] | None:
    """Return what tells a file or folder from any other that may get its name; None if there is none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


class Lock:
    """A folder that this process holds: its lock file is locked, whatever becomes of the names of both.

    `busy` and `remedy` are the words for the case that another process holds it.
    """

    def __init__(self, folder, busy: str, remedy: str, name: str):
        if "://" in str(folder):
            raise OSError(f"{folder} is an address, not a folder on this machine: {remedy}")
        self.folder, self.busy, self.remedy, self.path = Path(folder), busy, remedy, Path(folder) / name
        self.opened = None

    def acquire(self, seconds: float = 0) -> None:
        """Make the folder and lock it; a new folder belongs to nobody else. Raises OSError as lock() says."""
        import filelock

        try:
            self.is_new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.held = filelock.FileLock(self.path)
            try:
                self.held.acquire(timeout=0)
            except filelock.Timeout:
                if seconds == 0:
                    raise
                print(f"{self.busy} {self.folder}: waiting for it", file=sys.stderr, flush=True)
                with busy("waiting"):
                    self.held.acquire(timeout=seconds)
            self.identities = identity(self.path), identity(self.folder)
            if os.name == "posix":  # leads to the folder after it has been renamed
                self.opened = os.open(self.folder, os.O_RDONLY)
        except filelock.Timeout as error:
            raise OSError(f"{self.busy} {self.folder}: wait for it, or {self.remedy}") from error
        except OSError as error:
            raise OSError(f"cannot write to {self.folder}: {error.strerror or error}: {self.remedy}") from error

    def renew(self) -> str:
        """Make the folder or its lock file again if either has gone; return what had happened, or "".

        Raises UserError if another process has taken the folder's name in the meantime.
        """
        found = identity(self.path), identity(self.folder)
        if found == self.identities:
            return ""
        is_ours, fate = found[1] == self.identities[1], self.fate()
        if found[0] or (found[1] and not is_ours and not (self.folder.is_dir() and not os.listdir(self.folder))):
            raise UserError(f"{self.folder} is not this run's folder any more: {fate}, and what has that name now is "
                            "left as it is: the same command continues from the newest checkpoint in it, or, once it "
                            "has been moved away, begins anew")
        self.release()
        try:
            self.acquire()
        except OSError as error:
            raise UserError(f"{self.folder}: {fate}; it cannot be made again: {error}") from error
        return f"{self.path} was deleted" if is_ours else fate

    def fate(self) -> str:
        """Say what has become of the folder that was locked."""
        if self.opened is None:
            return "it was renamed or deleted"
        if os.fstat(self.opened).st_nlink == 0:
            return "it was deleted"
        try:
            where = os.readlink(f"/proc/self/fd/{self.opened}")
        except OSError:  # only Linux tells
            return "it was renamed"
        if where.endswith(" (deleted)"):  # file systems that keep no count
            return "it was deleted"
        return "its lock was replaced" if where == os.path.realpath(self.folder) else f"it was renamed to {where}"

    def release(self) -> None:
        """Give the folder back, and remove it if it was made for this and has stayed empty."""
        with contextlib.suppress(OSError):
            found = identity(self.path), identity(self.folder)
            if self.is_new and found == self.identities and os.listdir(self.folder) == [self.path.name]:
                os.unlink(self.path)
                self.folder.rmdir()
        self.held.release()
        if self.opened is not None:
            os.close(self.opened)
            self.opened = None


@contextlib.contextmanager
def lock(folder, busy: str, remedy: str, name: str = ".lock", seconds: float = 0):
    """Create `folder` and hold it, so that no other process writes the same files; yields the Lock.

    Raises OSError, "{busy} {folder}: wait for it, or {remedy}", if a live process still holds it after `seconds`, and
    OSError if the folder cannot be written to. The operating system drops the lock when the process ends, however it
    ends. A folder that was created for it is removed again if nothing has been written to it.
    """
    held = Lock(folder, busy, remedy, name)
    held.acquire(seconds)
    held.is_new = held.is_new and not seconds  # others may be waiting for this lock
    try:
        yield held
    finally:
        held.release()
