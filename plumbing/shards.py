"""Token files: shards of fineweb.py, llm.c, modded-nanogpt and nanoGPT, and text files. Each is checked when opened.

    open_tokens(data, split, out_dir, world)    [(name, tokens), ...] for a folder of shards or a text file
    read_ahead(loader, first, count)            has the system read micro-batches before they are needed

Tokens are uint16 arrays, or a Shard, which is sliced as one and reads only the slice: opening ten billion tokens reads
a few pages.
"""
import contextlib
import hashlib
import itertools
import re
import shlex
from pathlib import Path

import numpy as np

from plumbing import file_kinds
from plumbing.files import DataError
from plumbing.formats import kind_of
from plumbing.manifest import read_record
from plumbing.progress import busy, track
from plumbing.shard_file import Shard, check_gpt2, check_tokens, more_windows, open_shard, read_sample
from plumbing.tokenizer import EOT, VOCAB_SIZE

# the source that fineweb.py reads by default
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT"
SPLITS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}  # words in the names of shards
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # in a name, as splits_of() reads it


def open_tokens(data, split: str, out_dir="", world=None) -> list[tuple[str, np.ndarray | Shard]]:
    """Return (name, tokens) for every shard of a split, in file-name order. `data` may also be a text file.

    The tokens of a large text are kept in `out_dir`, where rank 0 of `world` writes them. Raises DataError if there are
    no shards, or if one is bad or missing.
    """
    data = Path(data)
    if data.is_file():
        from plumbing.text_file import open_text  # with what it needs to tokenize

        tokens, name = open_text(data, split, out_dir, world), f"{data} ({split})"
        if isinstance(tokens, Shard):
            name = f"{tokens.path} (made again from {data} if it is deleted)"
        return [(name, tokens)]
    if data.exists() and not data.is_dir():
        raise DataError(f"{str(data)!r} is neither a folder nor a file that can be read again: save its text as a file")
    if not data.is_dir():
        make = "python fineweb.py makes it; " if str(data) == "edu_fineweb10B" else ""
        raise DataError(f"no data {str(data)!r}: {make}--data takes a folder of token shards or a text file")
    if unfinished := next(data.glob("progress*.json"), None):
        raise DataError(f"the shards in {str(data)!r} are not all there: run the same fineweb.py command again, "
                        f"or delete {unfinished.name} to train on those that are")
    named = [path for path in sorted(data.iterdir()) if not path.name.startswith(".") and split in splits_of(path)]
    paths = [path for path in named if path.suffix.lower() in file_kinds.SHARDS]
    for path in paths:
        if len(splits_of(path)) > 1:
            raise DataError(f"shard {path} has both 'train' and 'val' in its name: rename it")
    packed = [path for path in named if path.suffix.lower() in (".npz", *file_kinds.PACKED)]
    for path in packed:
        if Path(path.stem).suffix.lower() in ("", *file_kinds.SHARDS):
            raise DataError(f"shard {path} is packed and would be left out: unpack it, or move it away")
    if not paths:
        raise no_shards(data, split)
    check_manifests(data)
    return [(str(path), open_shard(path)) for path in track(paths, "opening shards", "shards")]


def splits_of(path: Path) -> set[str]:
    """Return which of "train" and "val" are words in a file's name; a word ends at a capital letter or a non-letter."""
    words = {word.lower() for word in WORD.findall(path.name)}
    return {split for split, names in SPLITS.items() if words & names}


def no_shards(folder: Path, split: str) -> DataError:
    """Return the error for a folder without shards of a split, with what to type for what is there instead."""
    first = itertools.islice(folder.rglob("*"), 10_000)  # somebody may name a whole disk
    files = [path for path in sorted(first) if path.is_file() and not path.name.startswith(".")]
    shards = [path for path in files if path.suffix.lower() in file_kinds.SHARDS and "model" not in path.name]
    texts = [path for path in files if kind_of(path.name)]
    below = [path for path in shards if path.parent != folder]
    unnamed = [path for path in shards if not splits_of(path)]
    hint = f": run python fineweb.py, or name a folder of .npy or .bin files with {split!r} in their names"
    if found := next((path.parent for path in below if split in splits_of(path)), None):
        hint = f" itself: did you mean --data {shlex.quote(str(found))}?"
    elif found := next((path for path in below if split in splits_of(path.parent)), None):
        hint = (f" itself: move what is in its folders into it, with {split!r} in the names, such as "
                f"{split}_{found.name} for {found.relative_to(folder)}")
    elif unnamed:
        hint = f": if {unnamed[0].name} is one, rename it {split}_{unnamed[0].name}"
    elif shards:
        hint = f": rename one of the others, such as {shards[-1].name} to {split}_000000{shards[-1].suffix}"
    elif texts:
        alone = f", or --data {shlex.quote(str(texts[0]))}" if texts[0].suffix == ".txt" and len(texts) == 1 else ""
        hint = f", but texts such as {texts[0].name}: {file_kinds.shard_command(folder)}{alone}"
    elif any(path.match("model_*.pt") or path.name == "config.json" for path in files):
        hint = ", but a model: --init_from takes models, --data a folder of token shards or a text file"
    return DataError(f"no {split} shards in {str(folder)!r}{hint}")


def require_windows(n_windows: int, config, split: str) -> None:
    """Raise DataError if a split has no window of a TrainConfig's length."""
    if n_windows == 0:
        raise DataError(f"the {split} split of {config.data!r} is shorter than one window of {config.sequence_length} "
                        "+ 1 tokens: use more data or a smaller --sequence_length")


@busy("checking the shards")
def check_samples(loader, whole: int) -> dict:
    """Check a sample of the tokens of each shard of a loader, as reading all would take minutes; all of a small one.

    Returns hashes by which a resumed run recognizes its data: sha256 is of the number of tokens, begin, middle and end
    of each shard, windows_sha256 of windows spread over it, and tokens_sha256 of the first `whole` tokens of the split,
    or of all of a text that is in memory.
    """
    shards, vocab_size, hashed, spread = loader.shards, loader.vocab_size, hashlib.sha256(), hashlib.sha256()
    for name, shard in zip(loader.names, shards):
        hashed.update(f"{len(shard)} ".encode())
        windows, n_spread = read_sample(shard), len(more_windows(len(shard)))
        for digest, part in ((spread, windows[:n_spread]), (hashed, windows[n_spread:])):
            for tokens in part:
                digest.update(np.ascontiguousarray(tokens, dtype="<u2").data)
        if isinstance(shard, Shard):  # what was encoded here needs no check
            shard.remember(windows)
            if vocab_size == VOCAB_SIZE:
                check_gpt2(windows, name)
        for tokens in windows:
            check_tokens(tokens, name, vocab_size)
    whole = max([whole, *(len(shard) for shard in shards if not isinstance(shard, Shard))])
    return {"sha256": hashed.hexdigest(), "windows_sha256": spread.hexdigest(), "hashed_tokens": whole,
            "tokens_sha256": hash_tokens(shards, whole)}


def hash_tokens(shards: list[np.ndarray | Shard], count: int) -> str:
    """Hash the first `count` tokens of a split."""
    hashed = hashlib.sha256()
    for shard in shards:
        hashed.update(np.ascontiguousarray(shard[:count], dtype="<u2").data)
        count -= min(count, len(shard))
    return hashed.hexdigest()


def fingerprint(train_loader, val_loader) -> dict:
    """Describe the data of a run, so that it recognizes them when it is resumed."""
    return {"n_windows": train_loader.n_windows, **train_loader.hashes,
            **{f"val_{key}": value for key, value in val_loader.hashes.items()}}


def check_same(state: dict, train_loader, val_loader) -> None:
    """Raise DataError if the data are not those of a checkpoint's fingerprint; older ones lack some hashes."""
    before, now = state["data"], fingerprint(train_loader, val_loader)
    branch = " without --branch_from" if state["train_config"].get("branch_from") else ""
    remedy = (f"--data was {state['train_config'].get('data')}: restore it, or choose another --out_dir for a new run"
              f"{branch}")
    if before.get("n_windows") not in (None, now["n_windows"]):
        raise DataError(f"the data have {now['n_windows']} windows to train on, they had {before['n_windows']} when "
                        f"the run began: {remedy}")
    keys = ["sha256", "windows_sha256", "val_sha256", "val_windows_sha256"]
    for split in ("", "val_"):  # a branch may validate on more tokens
        if before.get(f"{split}hashed_tokens") == now[f"{split}hashed_tokens"]:
            keys.append(f"{split}tokens_sha256")
    for key in keys:
        if before.get(key) not in (None, now[key]):
            split = "validation" if key.startswith("val") else "training"
            raise DataError(f"the {split} data have other tokens than when the run began: {remedy}")


def read_ahead(loader, first: int, count: int) -> None:
    """Have the system read `count` micro-batches of a loader from the disk, from number `first` on; returns at once."""
    for i in range(first, first + count):
        for shard, start in loader.locate(i):
            tokens = loader.shards[shard]
            if isinstance(tokens, Shard):  # otherwise they are in memory
                tokens.read_ahead(start, start + loader.T + 1)


@busy("counting documents")
def count_documents(data, loaders: list) -> int:
    """Count the documents of a text file in which lines of <|endoftext|> separate them; 0 for one without, and shards.

    `loaders` have the splits that count.
    """
    if not Path(data).is_file():
        return 0
    parts = [tokens for loader in loaders for tokens in loader.shards]
    return sum(int(np.count_nonzero(tokens[start:start + 2**20] == EOT))
               for tokens in parts for start in range(0, len(tokens), 2**20))


def has_shards(folder) -> bool:
    """Return whether a folder holds anything but what a try of fineweb.py leaves that wrote no shard."""
    folder = Path(folder)
    return folder.exists() and (not folder.is_dir() or any(
        not path.name.startswith((".", "progress")) for path in folder.iterdir()))


def check_manifests(folder: Path) -> None:
    """Raise DataError if a shard in a manifest of fineweb.py is missing or has another size."""
    for manifest in sorted(folder.glob("manifest*.json")):
        recorded = []
        with contextlib.suppress(OSError):  # another program's, or damaged, which `fineweb.py --verify` reports
            recorded = read_record(manifest)["shards"]
        for shard in recorded:
            path = folder / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                problem = "damaged" if path.exists() else "missing"
                raise DataError(f"shard {path} is {problem}: run the fineweb.py command that made the folder again, "
                                f"or delete {manifest.name} to train on the shards that are there")


def describe(data, val_shards: list[np.ndarray], val_tokens: int) -> dict:
    """Describe the data of a run for its log: source and commit from the manifest, if any, and the validation hash.

    `val_shards` are the tokens of the validation split; the first `val_tokens` of them are hashed.
    """
    values = {}
    for manifest in sorted(Path(data).glob("manifest*.json"))[:1]:
        with contextlib.suppress(OSError):  # another program's, or another person's
            values = read_record(manifest)
    return {"source": values.get("source") or values.get("download"), "revision": values.get("revision"),
            "val_tokens": min(val_tokens, sum(map(len, val_shards))),
            "val_sha256": hash_tokens(val_shards, val_tokens)}
