"""Random shards, texts and sources, as people bring them: refused, or read as a plain reference reads them."""
import contextlib
import csv
import gzip
import io
import itertools
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
from helpers import ROOT, make_loader

import fineweb
from plumbing import manifest, resuming, text_file, texts, tokenizer
from plumbing.ranks import World
from plumbing.shards import open_tokens

CORPUS = (ROOT / "input.txt").read_text(encoding="utf-8")[:60_000]
WIDTHS = (*["<u2"] * 5, "<i2", ">u2", "<u4", "<i4", ">i4", "<i8", "<u8", "<f2", "<f4", "<f8", "u1", "?")
SENTENCES = ("The cat sat on the mat. ", "Le cœur déçu mais l'âme plûtôt naïve, ", "Äpfel und Böen\n",
             "Zażółć gęślą jaźń\n", "Съешь ещё этих. ", "漢字かな交じり文。", "한국어 문장 ", "καλημέρα ")
ODD = ("\n<|endoftext|>\n", "<|endoftext|>", "\r\n", "\r", "\n\n", " \t  ", "\x85\u2028\xa0\u3000", "\ufeff", "\0",
       "{\"text\": 1}\n", "text,label\n", "<p>", "\U0001f642\u200d\U0001f680", "12345", "it's", "\x1c", "      word")
CODES = (*["utf-8"] * 12, "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be",
         "latin-1", "cp1252", "cp1250", "cp1251", "koi8-r", "gb18030", "shift-jis", "euc-kr", "mac-roman", "cp037",
         "cp437")
TEXT = st.lists(st.one_of(st.sampled_from([*SENTENCES, "\n", "\n<|endoftext|>\n"]), st.sampled_from(ODD),
                          st.text(max_size=5)), max_size=30).map("".join)
MORE = st.one_of(*[st.just(b"")] * 4, st.binary(max_size=4))  # bytes in the middle of a text


def fuzz_data(fuzz, test) -> None:
    """Run the random tests of this module; `test` makes one of a function, and `fuzz` is the Fuzz that they share."""
    shards_of_any_width(fuzz, test)
    texts_in_any_code(fuzz, test)
    sources(fuzz, test)
    changed_sources(fuzz, test)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Shards and texts
# ---------------------------------------------------------------------------------------------------------------------

def shards_of_any_width(fuzz, test) -> None:
    """Token files of any width and form are refused, unless they are the uint16 that are then read."""
    gpt2 = np.array(tokenizer.encode(CORPUS))

    @test(start=st.integers(0, 9000), count=st.one_of(st.integers(5, 400), st.integers(400, 6000)),
          width=st.sampled_from(WIDTHS), below=st.sampled_from([50257, 50257, 256, 65]),
          form=st.sampled_from(["nanogpt", "nanogpt", "llm.c", "npy", "npy", "2d"]),
          more=st.sampled_from([b""] * 6 + [b"\0", b"\1\2"]))
    def shard(start, count, width, below, form, more):
        tokens = (gpt2[start:start + count] % below).astype(width, casting="unsafe")
        path = fuzz.fresh("shards") / {"nanogpt": "train.bin", "llm.c": "x_train.bin"}.get(form, "x_train.npy")
        data = tokens.tobytes() + more
        if form == "llm.c":
            path.write_bytes(np.array([20240520, 1, count, *[0] * 253], "<i4").tobytes() + data)
        elif form == "nanogpt":
            path.write_bytes(data)
        else:
            path.write_bytes(npy(tokens if form == "npy" else tokens[None]) + more)
        read = fuzz.call("shard of any width", lambda: make_loader(path.parent, "train", 1, 4).shards[0][:])
        right = width == "<u2" or (width == "<i2" and form in ("nanogpt", "llm.c"))
        right = right and form != "2d" and (form == "nanogpt" or not more) and len(more) % 2 == 0
        case = f"{count} tokens below {below} as {width}, {form}, {more}"
        if right:
            assert read is not None or below < 50257, f"refused: {case}"
            assert read is None or read.tobytes() == data, f"read otherwise: {case}"
        elif below > 256 and count >= 128:  # fewer may be anything
            assert read is None, f"taken: {case}"

    shard()


def npy(tokens) -> bytes:
    """A .npy file of them."""
    file = io.BytesIO()
    np.save(file, tokens)
    return file.getvalue()


def texts_in_any_code(fuzz, test) -> None:
    """Texts in any code, with any bytes, are refused, or give tiktoken's tokens of the whole, however they are cut."""
    @test(text=st.one_of(TEXT, st.lists(st.sampled_from(SENTENCES), min_size=9, max_size=30).map("".join)),
          code=st.sampled_from(CODES), place=st.integers(0, 2000), more=MORE,
          block=st.sampled_from([64, 100, 1 << 20]), piece=st.sampled_from([1, 5, 30, 100_000]), kept=st.booleans())
    def text_of_any_code(text, code, place, more, block, piece, kept):
        data = text.encode(code, "replace")
        is_plain = not more and len(text) > 99 and not any(odd in text for odd in ODD)
        data = data[:place] + more + data[place:]
        path = fuzz.fresh("text") / "text.txt"
        path.write_bytes(data)

        def read():
            splits = [open_tokens(path, split, path.parent, World())[0][1][:] for split in ("train", "val")]
            return np.concatenate(splits).tolist()

        with contextlib.ExitStack() as stack:
            for module, name, value in ((text_file, "BLOCK", block), (tokenizer, "PIECE", piece),
                                        (text_file, "IN_MEMORY", 0 if kept else 1 << 20)):
                stack.enter_context(patch.object(module, name, value))
            found = fuzz.call("text in any code", read)
        if found is not None:
            assert found == tokens_of_text(data.decode("utf-8-sig")), f"read otherwise: {data}"
            assert not is_plain or data.decode("utf-8-sig") == data.decode(code), f"read as UTF-8: {data}"
        elif is_plain:
            assert not code.startswith("utf-8"), f"refused: {data}"

    text_of_any_code()


def tokens_of_text(text: str) -> list[int]:
    """The tokens of a text file, in which lines of <|endoftext|> separate documents, by the plainest loop."""
    documents = [[]]
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if line.strip() == "<|endoftext|>":
            documents.append([])
        else:
            documents[-1].append(line)
    whole = ["\n".join(lines) for lines in documents]
    return plain(filter(None, whole)) if len(whole) > 1 else tokenizer.gpt2_encoding().encode_ordinary(whole[0])


def plain(documents) -> list[int]:
    """The tokens of documents, each after EOT."""
    return [token for text in documents for token in (tokenizer.EOT, *tokenizer.gpt2_encoding().encode_ordinary(text))]


# ---------------------------------------------------------------------------------------------------------------------
# 2. Sources of fineweb.py
# ---------------------------------------------------------------------------------------------------------------------

BAD = ('{"text": 3}', "no JSON", '{"text": ["a"]}', '{"other": "x"}', '{"text": "cut')
KINDS = ("jsonl", "jsonl.gz", "ndjson", "json", "csv", "tsv", "txt", "txt.gz", "parquet", "binary.parquet", "arrow",
         "md")
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.one_of(st.sampled_from([*SENTENCES, CORPUS[:900], ""]), st.text(CHARACTERS, max_size=20))
ROWS = st.lists(st.one_of(TEXTS, TEXTS, TEXTS, st.none(), st.sampled_from(BAD).map(str.encode)), max_size=6)
GOOD_ROWS = st.lists(st.one_of(TEXTS, st.none()), min_size=1, max_size=6)
WRONG = st.one_of(
    st.sampled_from([{}, {"text_column": "nope"}, {"text_column": "id"}, {"source": "nowhere"}, {"source": "inputs"},
                     {"num_nodes": 99}, {"node_rank": 3}, {"tokenizer": "bert"}, {"num_proc": -1}, {"max_tokens": -1},
                     {"num_nodes": 2, "node_rank": 1}, {"max_tokens": 3}, {"verify": True}]),
    st.integers(-2, 2**41).map(lambda size: {"shard_size": size}), st.text(max_size=5).map(
        lambda name: {"text_column": name}))


def write_source(folder: Path, files: list[tuple[str, list]]) -> list[list]:
    """Write files of (kind, rows) -> what each should give: texts, None for a row without one, bytes for a bad row."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_file(folder / f"{i}.{kind}", kind, rows) for i, (kind, rows) in enumerate(files)]


def write_file(path: Path, kind: str, rows: list) -> list:
    """Write one file -> what its rows should give."""
    import pyarrow as pa
    import pyarrow.parquet

    kind, data = kind.removesuffix(".gz"), b""
    if kind == "md":
        rows, data = [], b"# left out"
    elif kind == "txt":
        rows = [text.replace("\r\n", "\n").replace("\r", "\n") if isinstance(text, str) else text for text in rows[:1]]
        data = b"".join(b"caf\xe9 " if isinstance(row, bytes) else (row or "").encode() for row in rows)
        rows = [row or None for row in rows]
    elif kind in ("csv", "tsv"):
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
        for i, row in enumerate(["text", *rows]):
            writer.writerow(["id" if i == 0 else i, *(("a", "field", "more") if isinstance(row, bytes) else (row,))])
        rows, data = [row or None for row in rows], file.getvalue().encode()
    elif kind in ("jsonl", "ndjson"):
        data = b"".join((row if isinstance(row, bytes) else json.dumps({"id": 1, "text": row}).encode()) + b"\n"
                        for row in rows)
    elif kind == "json":
        rows = [row for row in rows if not isinstance(row, bytes)]
        data = json.dumps([{"text": row} for row in rows], indent=1).encode()
    else:
        rows = [row for row in rows if not isinstance(row, bytes)]
        column = pa.array([row and row.encode() for row in rows], pa.large_binary())
        table = pa.table({"id": range(len(rows)), "text": column.cast(
            pa.binary() if kind == "binary.parquet" else pa.string())})
        if kind == "arrow":
            with pa.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
        else:
            pa.parquet.write_table(table, path)
        return rows
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return rows


def prepare(**given) -> None:
    """Run fineweb.py with these flags, in small pieces, without waiting for the disk."""
    words = [[f"--{name}", str(value)] if value is not True else [f"--{name}"] for name, value in given.items()]
    with patch.object(texts, "PIECE_BYTES", 200), patch.object(resuming, "PIECE_BYTES", 200), (
            patch("os.fsync")):
        fineweb.main([*itertools.chain.from_iterable(words)])


def check_shards(out: Path, rows: list, shard_size: int, case: str, first: int = 0) -> None:
    """Assert that a folder of shards holds what the rows give, and that the manifest counts them.

    `first` is the size of the validation shard, if an earlier run has written it.
    """
    tokens = np.array(plain(row for row in rows if isinstance(row, str)), np.uint16)
    if not first:  # half of so few that they fill no second shard, unless there is but one
        first = shard_size if len(tokens) > shard_size else len(tokens) // 2 or 1
    expected = [npy(part) for part in (tokens[:first], *(
        tokens[i:i + shard_size] for i in range(first, len(tokens), shard_size)))]
    found = [path.read_bytes() for path in sorted(out.glob("*.npy"), key=lambda path: path.name[-10:])]
    assert found == expected, f"other shards: {case}"
    values = manifest.read_record(out / "manifest.json")
    counts = [sum(isinstance(row, kind) for row in rows) for kind in (str, bytes)]
    assert [values["documents"], values["skipped_rows"]] == counts, f"counted otherwise: {case}"
    manifest.verify(out)


def sources(fuzz, test) -> None:
    """Folders of files of all kinds, after a first try with a wrong flag: what the rows give, or one line."""
    @test(files=st.lists(st.tuples(st.sampled_from(KINDS), ROWS), min_size=1, max_size=4), wrong=WRONG,
          skip=st.booleans(), size=st.integers(9, 300))
    def source(files, wrong, skip, size):
        folder = fuzz.fresh("source")
        rows = list(itertools.chain.from_iterable(write_source(folder / "in", files)))
        given = {"source": folder / "in", "out": folder / "out", "shard_size": size, "tokenizer": "tiktoken",
                 "retries": 0}
        fuzz.call("fineweb.py, wrong flag", lambda: prepare(**{**given, **wrong}) or True)
        if (wrong or (folder / "out" / "manifest.json").exists()) and any((folder / "out").glob("*.npy")):
            shutil.rmtree(folder / "out")  # it was not wrong, or not at once
        more = {"skip_bad_rows": True} if skip else {}
        done = fuzz.call("fineweb.py", lambda: prepare(**given, **more) or True)
        n_texts, n_bad = (sum(isinstance(row, kind) for row in rows) for kind in (str, bytes))
        case = f"{files}, after {wrong}"
        assert (done is not None) == (n_texts > 0 and (skip or not n_bad)), f"{'taken' if done else 'refused'}: {case}"
        if done:
            check_shards(folder / "out", rows, size, case)

    source()


def changed_sources(fuzz, test) -> None:
    """A killed run goes on after its source was changed as if it had been so from the start, or says what changed."""
    files = st.lists(st.tuples(st.sampled_from([kind for kind in KINDS if kind != "md"]), GOOD_ROWS),
                     min_size=1, max_size=4)

    @test(before=files, changes=st.dictionaries(st.integers(0, 4), st.tuples(st.sampled_from(KINDS), GOOD_ROWS),
                                                max_size=2), cut=st.sampled_from([0, 0, 1]),
          size=st.integers(9, 200), kill=st.integers(1, 6))
    def changed(before, changes, cut, size, kill):
        folder, add = fuzz.fresh("changed"), manifest.Manifest.add
        given = {"source": folder / "in", "out": folder / "out", "shard_size": size, "tokenizer": "tiktoken",
                 "retries": 0}

        def add_and_copy(self, shard):
            add(self, shard)
            if len(self.shards) == kill:
                shutil.copytree(self.folder, folder / "killed")

        write_source(folder / "in", before)
        with patch.object(manifest.Manifest, "add", add_and_copy):
            fuzz.call("fineweb.py, to be killed", lambda: prepare(**given))
        if not (folder / "killed").exists():
            return
        written = manifest.read_record(folder / "killed" / "progress.json")["shards"]
        place = written[-1]["next"]
        first = 0 if len(written) == 1 and place[1:] == [0, 0] else written[0]["tokens"]  # the whole source, again
        after = [changes.get(i, old) for i, old in enumerate(before)]
        after = after[:len(after) - cut] + [new for i, new in sorted(changes.items()) if i >= len(before)]
        shutil.rmtree(folder / "in")
        rows = list(itertools.chain.from_iterable(write_source(folder / "in", after)))
        done = fuzz.call("fineweb.py, another source", lambda: prepare(**{**given, "out": folder / "killed"}) or True)
        case = f"{before} -> {after}, shards of {size}, killed after {kill} at {place}"
        read = place[0] + (place[1:] != [0, 0])  # files that have been read, the last perhaps in part
        if len(after) > 0 and after[:read] == before[:read]:
            assert done, f"refused: {case}"
        if done:
            check_shards(folder / "killed", rows, size, case, first)

    changed()
