"""The files of a source, on this disk or on the Hugging Face hub, and whether they are still those of an earlier run.

    find_files(source, retries, remedy)        ([File, ...], commit)
    name_of(source)                            a short name for its shards and their folder
    estimate_tokens(files)                     about how many tokens they hold
    count_same(known, files)                   how many files at the start are what a manifest records
"""
import difflib
import functools
import glob
import hashlib
import os
import re
import shlex
import unicodedata
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from plumbing.cli import UserError, plural, print0
from plumbing.conversions import BY_SUFFIX, count_suffixes, suffix_of, way_to_convert
from plumbing.files import walk
from plumbing.formats import ABOUT, READ, kind_of
from plumbing.hub_files import SITES, Dataset, list_hub_files, parse_dataset
from plumbing.network import patiently
from plumbing.shards import FINEWEB_EDU, SPLITS, WORD

TOKENS_PER_BYTE = {"parquet": 0.35, "arrow": 0.22, "gz": 0.6, "zst": 0.6}  # rough averages; 0.22 for plain text
LONGEST = 40  # characters of a name made of a source's
HASHED = 1 << 16  # bytes at each end of a file that are part of its fingerprint


class File(NamedTuple):
    """A file of a source."""

    path: str  # where it is read: on this disk, or an hf:// address that contains the commit
    name: str  # relative to the source; the address, if it is on the hub
    size: int  # bytes
    sha256: str | None = None  # of its first and last HASHED bytes; None on the hub, where the commit says enough

    @property
    def record(self) -> list:
        """Return what the manifest says of it."""
        return [self.name, self.size] + ([self.sha256] if self.sha256 else [])


# ---------------------------------------------------------------------------------------------------------------------
# 1. Which files there are
# ---------------------------------------------------------------------------------------------------------------------

def find_files(source: str, retries: int, remedy: str) -> tuple[list[File], str | None]:
    """Return ([File, ...], commit) for the data files that --source names, in reading order.

    The commit is None for local files. Files that are left out are said in one line. Raises UserError if there are no
    data files, with what to type.
    """
    dataset = hub_dataset(source)
    if dataset:
        listing = functools.partial(list_hub_files, dataset)
        found, commit = patiently(listing, f"list {source} on the Hugging Face hub", retries, remedy)
        everything = [File(name, name, size) for name, size in found if not name.rpartition("/")[2].startswith(".")]
        where = f"{dataset.name} on the hub"
    else:
        everything, commit, where = list_local(os.path.expanduser(source)), None, source
    names = {file.name for file in everything}
    is_one = len(everything) == 1 and Path(source).name == Path(everything[0].name).name  # asked for by its name
    files = [file for file in everything if kind_of(file.name) and (is_one or not (
        ABOUT.fullmatch(Path(file.name).name) or is_cache(file.name, names)))]
    if not files:
        raise UserError(nothing_to_read(source, where, everything))
    others = sorted(names - {file.name for file in files})
    if others:
        print0(f"{where}: {len(others):,} {plural(len(others), 'file')} left out: {count_suffixes(others)}")
    if not dataset:
        files = [file._replace(sha256=fingerprint(file.path)) for file in files]
    return sorted(files, key=lambda file: file.path), commit


def name_of(source: str) -> str:
    """Return a short name for what --source names, of ASCII letters, digits, - and _, without a word for a split.

    That of FineWeb-Edu's default part is build-nanogpt's, edufineweb. Asks neither disk nor network for more than
    whether a file is there.
    """
    path, dataset = Path(os.path.expanduser(source)), parse_dataset(source)
    is_local = "://" not in source and (os.path.exists(path) or bool(re.search(r"[*?[]", source)))
    if is_fineweb_edu(source):
        return "edufineweb"
    if dataset and not is_local:
        name = "-".join([dataset.repository.split("/")[1], *Path(dataset.folder or "").parts])
    else:
        name = Path(os.path.abspath(Path(*fixed_parts(str(path))))).name
    if kind_of(name):
        name = Path(re.sub(r"(?i)\.(gz|zst)$", "", name)).stem
    safe = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    safe = re.sub(r"[^A-Za-z0-9-]+", "_", safe).strip("_-")[:LONGEST]
    splits = set().union(*SPLITS.values())
    safe = WORD.sub(lambda word: "_" if word[0].lower() in splits else word[0], safe)
    return re.sub(r"[_-]*_[_-]*", "_", safe).strip("_-") or "texts"


def is_fineweb_edu(source: str) -> bool:
    """Return whether --source names what is read by default, FineWeb-Edu's sample-10BT at its commit."""
    return parse_dataset(source) == parse_dataset(FINEWEB_EDU)


def hub_dataset(source: str) -> Dataset | None:
    """Return the dataset on the hub that --source names, or None if it names local files. Asks no network.

    Raises UserError, with what to type, if it names neither.
    """
    path = Path(os.path.expanduser(source))
    if "://" not in source and path.exists():
        return None
    if re.search(r"[*?[]", source) and "://" not in source:
        if not glob.glob(os.path.expanduser(source), recursive=True):
            raise UserError(f"no file matches --source {source!r} in {os.getcwd()}: check the pattern and its quotes"
                            f"{part_of_dataset(source)}")
        return None
    dataset = parse_dataset(source)
    if dataset and re.search(r"[*?[]", dataset.folder or ""):
        folder = "/".join(["", *fixed_parts(dataset.folder)])
        raise UserError(f"--source {source!r} is a pattern, and on the hub there are none: name one file or folder of "
                        f"it, such as {dataset._replace(folder=None).name}{folder}")
    if dataset and ("://" in source or not looks_local(source, dataset)):
        return dataset
    if "://" in source:
        raise UserError(f"--source {source!r} is {fetch_command(source)}")
    near = difflib.get_close_matches(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
    guess = f": did you mean {str(path.with_name(near[0]))!r}?" if near else ""
    message = f"--source {source!r} does not exist{guess}"
    if re.fullmatch(r"[\w.-]+", source) and not kind_of(source):
        message += f"; a dataset on the hub is OWNER/NAME: see https://huggingface.co/datasets?search={source}"
    elif dataset:
        message += f"; a dataset of that name on the hub is --source hf://datasets/{dataset.name}"
    elif plain := parse_dataset(source.strip(" '\"")):
        message += f": did you mean {plain.name!r}?"
    else:
        message += part_of_dataset(source)
    raise UserError(message)


def part_of_dataset(source: str) -> str:
    """Return how to name a part of a dataset on the hub, if a source that does not exist looks like one; else ""."""
    if not re.match(r"[\w.-]+/[\w.-]+([:,#\[]|@|/.*[*?])", source):
        return ""
    name = re.match(r"[\w.-]+/[\w.-]+", source)[0]
    return (f"; of a dataset on the hub, a split or configuration is named by its folder or file, {name}/PATH: see "
            f"https://huggingface.co/datasets/{name}/tree/main")


def looks_local(source: str, dataset: Dataset) -> bool:
    """Return whether a path that does not exist is a mistyped file rather than a dataset, by form and neighbours."""
    if source.startswith((".", "/", "~", "\\")):
        return True
    suffix = suffix_of(dataset.repository)
    return Path(source).parts[0] in os.listdir() or (
        not dataset.folder and bool(kind_of(dataset.repository) or suffix in BY_SUFFIX))


def fetch_command(address: str) -> str:
    """Return what is said of an address that is not that of a dataset on the hub."""
    scheme, _, rest = address.partition("://")
    if scheme.lower() == "file":
        return f"on this disk: name it as {shlex.quote(unquote(urlsplit(address).path))}"
    if scheme == "hf" or rest.startswith(SITES):
        return ("no dataset on the hub: its address is hf://datasets/OWNER/NAME[@REVISION][/PATH] or "
                "https://huggingface.co/datasets/OWNER/NAME[/tree/REVISION/PATH]")
    command = {"s3": "aws s3 cp {} .", "gs": "gcloud storage cp {} ."}.get(scheme.lower(), "curl -LO {}")
    return f"not on the Hugging Face hub: fetch it first, {command.format(shlex.quote(address))}, then name the file"


def list_local(source: str) -> list[File]:
    """Return the files of a local file, folder or pattern, hidden ones left out. One with several links is listed once.

    Links to folders are followed. Raises UserError if a link leads nowhere.
    """
    root = Path(source)
    if root.is_file():  # comes first, because a file's name may look like a pattern
        paths, root = [root], root.parent
    elif root.is_dir():
        paths = list(walk(root))
    else:
        paths = [Path(path) for path in glob.glob(source, recursive=True)]
        root = Path(*fixed_parts(source))
    found, once = [], set()
    for path in sorted(paths):
        if (len(paths) > 1 and is_hidden(path, root)) or path.is_dir():
            continue
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}: restore what it leads to, or delete it"
                            ) from error
        if (status.st_dev, status.st_ino) not in once:
            once.add((status.st_dev, status.st_ino))
            found.append(File(path.as_posix(), relative(path, root), status.st_size))
    return found


def fixed_parts(pattern: str) -> list[str]:
    """Return the parts of a pattern before the first that is one."""
    parts = list(Path(pattern).parts)
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
    return parts[:first]


def is_hidden(path: Path, folder: Path) -> bool:
    """Return whether a path is hidden or lies in a hidden folder below `folder`, such as editors and caches create."""
    inside = path.relative_to(folder).parts if path.is_relative_to(folder) else (path.name,)
    return any(part.startswith(".") and part != ".." for part in inside)


def relative(path: Path, folder: Path) -> str:
    """Return the path relative to the folder that the source names."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def is_cache(name: str, names: set[str]) -> bool:
    """Return whether an .arrow file was left in a folder of save_to_disk by later work on the dataset."""
    folder, slash, last = name.rpartition("/")
    return last.startswith(("cache-", "tmp")) and kind_of(name) == "arrow" and f"{folder}{slash}state.json" in names


def nothing_to_read(source: str, where: str, everything: list[File]) -> str:
    """Return the error for a source without data files: what it has instead, and what to type."""
    if not everything:
        return f"there are no files in {where}: --source takes {READ}, a folder of them or a dataset on the hub"
    names = [file.name for file in everything]
    counts = {}
    for file in everything:
        counts.setdefault(suffix_of(file.name), file)
    most = max(counts, key=lambda suffix: sum(suffix_of(name) == suffix for name in names))
    what = f"{source} is" if len(names) == 1 and Path(source).name == Path(names[0]).name else (
        f"{where} has {count_suffixes(names)}, and")
    return f"{what} not {READ}: first {way_to_convert(counts[most].path)}"


def estimate_tokens(files: list[File]) -> int:
    """Estimate the number of tokens in the files from their sizes."""
    return int(sum(file.size * TOKENS_PER_BYTE.get(Path(file.name.lower()).suffix[1:], 0.22) for file in files))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Whether they are the same
# ---------------------------------------------------------------------------------------------------------------------

def fingerprint(path: str) -> str:
    """Return a hash of the first and the last HASHED bytes of a file."""
    with open(path, "rb") as file:
        hashed = hashlib.sha256(file.read(HASHED))
        file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - HASHED))
        hashed.update(file.read(HASHED))
    return hashed.hexdigest()


def is_same(record: list, file: File) -> bool:
    """Return whether a file is what a manifest records: its content and kind, not its name, if it is a local one.

    Records of an earlier form, [name, bytes], have the name as it was spelled then: its last part is compared.
    """
    name, size, digest = [*record, None][:3]
    if kind_of(name) != kind_of(file.name) or size != file.size:
        return False
    if digest and file.sha256:
        return digest == file.sha256
    return name == file.name if "://" in name + file.name else Path(name).name == Path(file.name).name


def count_same(known: list[list], files: list[File]) -> int:
    """Return how many files at the start are what the manifest records."""
    pairs = enumerate(zip(known, files))
    return next((i for i, (record, file) in pairs if not is_same(record, file)), min(len(known), len(files)))


def those_read_before(recorded: list[File], files: list[File]) -> list[File]:
    """Leave out the kinds of files that an earlier version did not read, if it has made the manifest's records."""
    earlier = [file for file in recorded if "://" not in file.path and not file.sha256]
    if not earlier:
        return files
    return [file for file in files if re.search(r"\.(parquet|jsonl|jsonl?\.(gz|zst))$", file.path)]
