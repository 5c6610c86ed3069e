"""Work over an unreliable network: retries and downloads."""
import hashlib
import itertools
import sys
import threading
import time
from pathlib import Path

from plumbing import files
from plumbing.cli import UserError, above_bars, explain, print0
from plumbing.progress import progress_bar

RETRIES = 3  # attempts that follow a failed download
TIMEOUT = (10, 30)  # seconds to wait for a connection, and for the next bytes
LOCK_SECONDS = 1800  # longest wait for another process that downloads the same file


def patiently(action, what: str, retries: int, remedy: str):
    """Return action(), trying again after network errors. Raises UserError as wait_or_give_up() does."""
    for failures in itertools.count(1):
        try:
            return action()
        except (UserError, ModuleNotFoundError):
            raise
        except Exception as error:  # network clients raise dozens of types
            wait_or_give_up(failures, retries, what, error, remedy)


def wait_or_give_up(failures: int, retries: int, what: str, error: Exception, remedy: str,
                    stop: threading.Event | None = None) -> None:
    """Wait 1, 2, 4 ... 60 seconds after `failures` failed attempts in a row to do `what`.

    Raises UserError, with the remedy, after more failures than `retries`, and at once if another attempt cannot
    succeed: for a status code 4xx other than 408 and 429, and if the hub is in offline mode. Setting `stop` ends the
    wait with a UserError.
    """
    statuses = [getattr(getattr(each, "response", None), "status_code", None) for each in chain(error)]
    status = next(filter(None, statuses), 500)
    hopeless = type(error).__name__ == "OfflineModeIsEnabled" or (400 <= status < 500 and status not in (408, 429))
    if failures > retries or hopeless:
        raise UserError(f"cannot {what}: {explain(error)}; {advise(error)}{remedy}") from error
    seconds = min(60, 2 ** (failures - 1))
    with above_bars():
        print(f"\nwarning: cannot {what}: {explain(error)}; trying again in {seconds} s ({failures} of {retries})",
              file=sys.stderr, flush=True)
    wait(seconds, stop)


def wait(seconds: int, stop: threading.Event | None = None) -> None:
    """Wait before the next attempt. Raises UserError if `stop` is set meanwhile."""
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise UserError("interrupted")


def chain(error: Exception) -> list[Exception]:
    """Return an error and those that caused it, not those that were being handled when it came."""
    errors = [error]
    while errors[-1].__cause__:
        errors.append(errors[-1].__cause__)
    return errors


def advise(error: Exception) -> str:
    """Return what the user can do about an error of the hub's client that another attempt does not mend."""
    names = {type(each).__name__ for each in chain(error)}
    if "GatedRepoError" in names:
        return "accept its conditions on its page at huggingface.co, run hf auth login, then "
    if "RepositoryNotFoundError" in names:
        return "is the name right? if it is private, run hf auth login; "
    if "RevisionNotFoundError" in names:
        return "it has no such revision: name another after the @; "
    return ""


def download(url: str, path: Path, size: int, sha256: str) -> None:
    """Download `url` to `path`, with a progress bar, unless the right file is there already.

    `path` appears only when its size in bytes and its SHA-256 are right. If another process is downloading the same
    file, this one waits for it. Raises UserError or OSError, with the remedy, if the network fails or the file cannot
    be written.
    """
    def is_there() -> bool:
        return path.is_file() and files.sha256(path) == sha256

    if is_there():
        return
    by_hand = f"put the file from {url} into {path.parent}/ yourself"
    with files.lock(path.parent, "another process is downloading into", by_hand, f".{path.name}.lock", LOCK_SECONDS):
        if is_there():  # the other process has finished
            return
        if path.exists():
            print0(f"warning: {path} is not the expected file: downloading it again")
        patiently(lambda: fetch(url, path, size, sha256), f"download {path.name}", RETRIES,
                  f"check the network, or {by_hand}")


def fetch(url: str, path: Path, size: int, sha256: str) -> None:
    """Try once to download `url` to `path`.

    Raises OSError if the network fails or sends another file, and UserError if the file cannot be written.
    """
    import requests

    try:
        with requests.get(url, stream=True, timeout=TIMEOUT) as response, files.atomic_write(path) as file:
            response.raise_for_status()
            digest = hashlib.sha256()
            with progress_bar(size, 0, "B") as bar:
                for data in response.iter_content(1 << 16):
                    digest.update(data)
                    bar.update(file.write(data))
                    if file.tell() > size:
                        break
            if file.tell() != size or digest.hexdigest() != sha256:
                raise OSError(f"received {file.tell():,} bytes of {response.headers.get('Content-Type')}, not the "
                              f"{size:,} with the SHA-256 {sha256[:8]}...")
    except OSError as error:
        if error.errno is None and not isinstance(error, files.DataError):
            raise  # requests' errors have no number; those of this machine's disk have one
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error

