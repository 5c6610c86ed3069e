"""What a file that is given as data really is, by its name and its first bytes, and what to type instead.

    kind_of(name)                   "parquet", "jsonl", "txt" ... by the suffix of a file; None for what is not read
    kind_by_bytes(head)             the suffix that such files have, such as ".pdf"; "" if it may be text
    refuse_other_kinds(path, head)  raises DataError unless the file may be plain text
"""
import json
import re
import shlex
from pathlib import Path

from plumbing.conversions import way_to_convert
from plumbing.files import DataError

MAGIC = {  # first bytes, and the suffix of the files that begin with them
    b"%PDF-": ".pdf", b"PK\x03\x04": ".zip", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz",
    b"7z\xbc\xaf\x27\x1c": ".7z", b"Rar!\x1a": ".rar", b"PAR1\x15": ".parquet", b"ARROW1\0": ".arrow",
    b"\xff\xff\xff\xff": ".arrow", b"\x93NUMPY": ".npy", b"SQLite format 3\0": ".sqlite", b"{\\rtf1": ".rtf",
    b"\x89HDF": ".h5", b"\xd0\xcf\x11\xe0": ".doc", b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"\x7fELF": ".so",
    b"\x80\x02": ".pkl", b"\x80\x03": ".pkl", b"\x80\x04": ".pkl", b"\x80\x05": ".pkl", b"\x20\x05\x35\x01": ".bin",
}
LFS = b"version https://git-lfs.github.com/spec/"  # how Git's stand-in for a large file begins
NOT_FETCHED = "it is not there yet, only Git LFS's note of it: fetch it with git lfs pull"
PACKED = (".gz", ".tgz", ".tar", ".zip", ".zst", ".xz", ".bz2", ".7z", ".rar", ".lz4")
LONG = 2**20  # bytes of a head that is not the whole file
TABLES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".arrow", ".feather")
DOCUMENTS = (".html", ".htm", ".xml", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".xls", ".xlsx", ".ipynb",
             ".sqlite", ".db", ".h5", ".hdf5", ".png", ".jpg", ".so")
WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors", ".gguf")
SHARDS = (".npy", ".bin")
PICKLES = (".pkl", ".pickle", ".npz")


def kind_of(name: str) -> str | None:
    """Return the kind of a data file by its name: its suffix, without .gz or .zst. None if it is not read."""
    match = re.search(r"\.(?:(parquet|arrow)|(jsonl|ndjson|json|txt|csv|tsv)(?:\.(?:gz|zst))?)$", name.lower())
    return (match[1] or match[2]) if match else None


def kind_by_bytes(head: bytes) -> str:
    """Return the suffix that files with these first bytes have, or "" for plain text and what is not known."""
    for magic, suffix in MAGIC.items():
        if head.startswith(magic):
            return suffix
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return ".bz2"
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:20].lower()
    if begin.startswith((b"<!doctype html", b"<html")):
        return ".html"
    if begin.startswith((b"<?xml", b"<mediawiki")):
        return ".xml"
    return json_kind(head) if begin[:1] in (b"{", b"[") else table_or_markup(head)


def table_or_markup(head: bytes) -> str:
    """Return ".csv" or ".tsv" if the first line names columns, text among them; ".html" if much of it is tags."""
    first, _, rest = head.decode("utf-8-sig", errors="ignore").partition("\n")
    for separator, suffix in ((",", ".csv"), ("\t", ".tsv")):
        names = [name.strip().strip('"').lower() for name in first.split(separator)]
        is_header = len(names) > 1 and all(re.fullmatch(r"\w{0,40}", name) for name in names)
        if is_header and {"text", "content", "label", "title", "body"} & {*names} and separator in rest:
            return suffix
    tags = re.findall(rb"</?[A-Za-z][^<>]*>|<!--", head)
    return ".html" if len(tags) > 9 and sum(map(len, tags)) > len(head) / 5 else ""


def json_kind(head: bytes) -> str:
    """Return ".jsonl" if all lines are JSON objects, ".json" if it is one JSON value, else ""."""
    text = head.decode("utf-8-sig", errors="ignore").strip()
    lines = [line for line in text.split("\n")[:100] if line.strip()]
    if all(line[0] == "{" and begins_with_json(line) for line in lines[:-1] or lines):  # the last one may be cut
        return ".jsonl"
    is_list, inside = text[0] == "[", text[1:].lstrip()
    if is_list and inside[:1] != "{":
        return ".json" if inside[:1] in ("[", '"') and begins_with_json(text, end=True) else ""
    members = inside[1:].lstrip() if is_list else inside
    key = re.match(r'"(?:[^"\\\n]|\\.)*"\s*:\s*', members)
    # the first value tells, unless it is so long that it is cut: the whole need not be there
    return ".json" if key and (begins_with_json(members[key.end():]) or len(head) >= LONG) else ""


def begins_with_json(text: str, end: bool = False) -> bool:
    """Return whether a text begins with a whole JSON value, and if so asked, ends with it."""
    try:
        _, length = json.JSONDecoder().raw_decode(text)
        return not end or length == len(text)
    except (ValueError, RecursionError):
        return False


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise DataError if a file given as a text is of another kind, saying which and what to type.

    `head` are its first bytes. Code, Markdown and whatever else a person writes are text.
    """
    named, found = path.suffix.lower(), kind_by_bytes(head)
    if found in (".html", ".csv", ".tsv") and named not in ("", ".txt", ".text"):
        found = ""  # code may look so
    suffix = found or named
    known = (*PACKED, *TABLES, *DOCUMENTS, *WEIGHTS, *SHARDS, *PICKLES)
    if suffix in known:
        if found == ".zip" and named in (*WEIGHTS, *DOCUMENTS):  # of which some are zip archives
            suffix = named
        raise DataError(f"{path} is not a text file, it seems to be {suffix}: {remedy(path, suffix)}")


def remedy(path: Path, suffix: str) -> str:
    """Say what to type for a file of the kind that has this suffix."""
    quoted = shlex.quote(str(path))
    if suffix in SHARDS:
        return f"name the folder of shards that it is in: --data {shlex.quote(str(path.parent))}"
    if suffix in WEIGHTS:
        return f"weights go to --init_from {quoted}"
    if suffix in PICKLES:
        return "pickles are never read, as they can run code: save its tokens with np.save as .npy, or its text as .txt"
    renamed, rename = path, ""
    if path.suffix.lower() != suffix:
        renamed = path.with_name(path.name + suffix)
        rename = f"mv {quoted} {shlex.quote(str(renamed))}, then "
    if kind_of(renamed.name) not in (None, "txt"):
        return (f"make shards of its texts: {rename}{shard_command(renamed)} "
                "(with --text_column NAME if they are not in the column 'text')")
    command = way_to_convert(str(renamed)).removeprefix("first ")
    return f"unpack it: {rename}{command}" if suffix in PACKED else f"take its text: {rename}{command}, and name that"


def shard_command(source: Path) -> str:
    """Return the fineweb.py command that makes shards of a file or folder, and the flag that then names them."""
    name = source.name.split(".")[0] or "texts"
    out = shlex.quote(f"{name}_shards")
    return f"python fineweb.py --source {shlex.quote(str(source))} --out {out}, then --data {out}"
