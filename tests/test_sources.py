"""What people bring to fineweb.py: files of every kind, sources that were mended or moved, names of datasets.

    pytest tests/test_sources.py
"""
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ENCODING,
    documents,
    fineweb_command,
    mostly_slow,
    needs,
    plain_tokens,
    prepare,
    shards,
    slow,
    write_jsonl,
    write_parquet,
)
from hub import COMMIT, hub, use_here

import fineweb
from plumbing.cli import UserError
from plumbing.hub_files import Dataset, parse_dataset
from plumbing.shards import has_shards

pytestmark = needs(*ENCODING, "datasets", "gigatoken", "awkward")
pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
FAST = dict(tokenizer="tiktoken")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def tokens(folder) -> list[int]:
    """All tokens of a folder of shards."""
    return np.concatenate(shards(folder)).tolist()


def manifest(folder) -> dict:
    return json.loads((Path(folder) / "manifest.json").read_text())


def refused(match: str, **arguments) -> str:
    """Return the one line with which the command ends; it must match, and leave no folder behind."""
    with pytest.raises((UserError, OSError), match=match) as error:
        prepare(**arguments, **FAST)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of files
# ---------------------------------------------------------------------------------------------------------------------

TEXTS = ["first", " two lines\nof it, with \"quotes\"", "007", "2021-01-01", "NA", "naïve 你好", "<|endoftext|>",
         "x" * 200_000]


def write_txt(folder, texts):
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return folder


def write_csv(path, texts, delimiter=","):
    import csv

    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([("id", "text"), *enumerate(texts)])
    return path


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1))
    return path


def write_arrow(path, texts):
    import datasets

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)
    (path / "cache-12.arrow").write_bytes(b"left by map")
    return path


def write_feather(path, texts):
    with pa.ipc.new_file(path, pa.schema({"text": pa.string()})) as file:
        file.write(pa.record_batch({"text": texts}))
    return path


def compressed(path, data: bytes):
    path.write_bytes(gzip.compress(data))
    return path


ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CRLF = LINES.replace(b"\n", b"\r\n")
KINDS = {
    "txt": lambda base: write_txt(base / "in", TEXTS),
    "csv": lambda base: write_csv(base / "a.csv", TEXTS),
    "tsv": lambda base: write_csv(base / "a.tsv", TEXTS, "\t"),
    "csv with semicolons": lambda base: write_csv(base / "A.CSV", TEXTS, ";"),
    "json": lambda base: write_json(base / "a.json", ROWS),
    "json with data": lambda base: write_json(base / "a.json", {"version": "1", "data": ROWS}),
    "json in one line": lambda base: (base / "a.json").write_text(json.dumps({"data": ROWS})) and base / "a.json",
    "json lines": lambda base: (base / "a.json").write_bytes(LINES) and base / "a.json",
    "jsonl with a list": lambda base: write_json(base / "a.jsonl", ROWS),
    "strings": lambda base: write_json(base / "a.json", TEXTS),
    "JSONL": lambda base: (base / "A.JSONL").write_bytes(b"\xef\xbb\xbf" + CRLF) and base / "A.JSONL",
    "jsonl that is gzip": lambda base: compressed(base / "a.jsonl", LINES),
    "json.gz": lambda base: compressed(base / "a.json.gz", json.dumps(ROWS).encode()),
    "save_to_disk": lambda base: write_arrow(base / "saved", TEXTS),
    "arrow": lambda base: write_feather(base / "a.arrow", TEXTS),
    "binary": lambda base: write_parquet(base / "a.parquet", pa.array([text.encode() for text in TEXTS], pa.binary())),
    "large_binary": lambda base: write_parquet(base / "a.parquet", pa.array(map(str.encode, TEXTS), pa.large_binary())),
}


@pytest.mark.parametrize("kind", mostly_slow(list(KINDS), kept=9))
def test_every_kind_of_file_gives_the_tokens_of_its_texts_also_after_a_stop(kind, tmp_path):
    source = KINDS[kind](tmp_path)
    prepare(source=source, out=tmp_path / "out", shard_size=5000, **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(TEXTS).tolist()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for k in (0, 3):
        min((tmp_path / "out").glob(f"*{k:06d}.npy")).unlink()
        prepare(source=source, out=tmp_path / "out", shard_size=5000, **FAST)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_txt_is_read_as_python_reads_it(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "in" / "b.txt").write_bytes(b"")
    compressed(tmp_path / "in" / "c.TXT.gz", b"packed")
    (tmp_path / "in" / "README.txt").write_text("about it")
    prepare(source=tmp_path / "in", out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(["one\ntwo\nthree\n", "packed"]).tolist()
    prepare(source=tmp_path / "in" / "README.txt", out=tmp_path / "asked for", **FAST)
    assert tokens(tmp_path / "asked for") == plain_tokens(["about it"]).tolist()


def test_a_folder_says_what_it_leaves_out_and_follows_links(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "in" / "a.jsonl", ["a"])
    os.link(tmp_path / "in" / "a.jsonl", tmp_path / "in" / "twice.jsonl")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    for name in ("x.md", "y.md", "z.zip"):
        (tmp_path / "in" / name).write_text("x")
    prepare(source=tmp_path / "in", out=tmp_path / "out", **FAST)
    assert "3 files left out: 2 .md, 1 .zip" in capsys.readouterr().out
    assert tokens(tmp_path / "out") == plain_tokens(["a", "b"]).tolist()
    (tmp_path / "in" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    refused("gone.jsonl cannot be read", source=tmp_path / "in", out=tmp_path / "two")


@pytest.mark.parametrize("name, way", [
    ("a.zip", "unzip"), ("a.tar", "tar xf"), ("a.tar.gz", "tar xf"), ("a.tgz", "tar xf"), ("a.7z", "7z x"),
    ("a.xml", "itertext"), ("a.html", "pandoc"), ("a.pdf", "pdftotext"), ("a.docx", "pandoc"), ("a.epub", "pandoc"),
    ("a.jsonl.bz2", "bunzip2"), ("a.txt.xz", "unxz"), ("a.pkl", "any code"), ("a.xlsx", "read_excel"), ("a.md", "cp "),
    ("a.npy", "train_gpt2.py --data"), ("a.strange", "make it a .txt file"), ("noname", "make it a .txt file")])
def test_other_files_are_refused_with_what_to_type(name, way, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"content")
    for source in (tmp_path / "in" / name, tmp_path / "in"):
        assert way in refused("not a .parquet, .jsonl", source=source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.xml", "a.md", "a.zip", "a.tar.gz"])
def test_what_to_type_works(name, tmp_path):
    (tmp_path / "plain.txt").write_text("<x>hello</x>")
    if name == "a.zip":
        shutil.make_archive(tmp_path / "a", "zip", tmp_path, "plain.txt")
    elif name == "a.tar.gz":
        shutil.make_archive(tmp_path / "a", "gztar", tmp_path, "plain.txt")
    else:
        shutil.copy(tmp_path / "plain.txt", tmp_path / name)
    if name == "a.zip" and not shutil.which("unzip"):
        pytest.skip("no unzip here")
    line = refused("first ", source=tmp_path / name, out=tmp_path / "out").partition(": first ")[2]
    (tmp_path / "work").mkdir()
    line = line.replace("python -c", f"{sys.executable} -c")
    assert subprocess.run(line, shell=True, cwd=tmp_path / "work").returncode == 0
    assert list((tmp_path / "work").rglob("*.txt"))


@pytest.mark.parametrize("code", ["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32", "WINDOWS-1252"])
@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_other_encodings_are_refused_with_a_command_that_works(code, suffix, tmp_path):
    text = {"txt": "déjà vu", "csv": "text\ndéjà vu\n", "jsonl": '{"text": "d\u00e9j\u00e0 vu"}\n'}[suffix] * 1
    (tmp_path / f"a.{suffix}").write_bytes(text.encode(code.lower()))
    if (code, suffix) == ("WINDOWS-1252", "jsonl"):
        pytest.skip("bytes that are not UTF-8 become U+FFFD in JSON lines")
    line = refused("UTF-8", source=tmp_path / f"a.{suffix}", out=tmp_path / "out")
    shell = line[line.index("iconv"):].partition(" (")[0]
    assert subprocess.run(shell, shell=True, cwd=tmp_path).returncode == 0
    prepare(source=tmp_path / f"utf8_a.{suffix}", out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(["déjà vu"]).tolist()


CHAT = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], [{"role": "user", "content": "x"}]]


@pytest.mark.parametrize("kind, values, expected", [
    ("parquet", CHAT, ["hi\nho", "x"]), slow("jsonl", [["a", "b"], ["c"]], ["a\nb", "c"]),
    slow("jsonl", CHAT, ["hi\nho", "x"]), slow("parquet", [["a", "b"], ["c"]], ["a\nb", "c"])])
def test_a_column_of_lists_names_a_command_that_works(kind, values, expected, tmp_path):
    source = (write_parquet if kind == "parquet" else write_jsonl)(tmp_path / f"a.{kind}", values)
    line = refused("join it to one text first", source=source, out=tmp_path / "out")
    shell = line[line.index("python -c"):].partition(" (leave")[0].replace("python -c", f"{sys.executable} -c")
    shell = shell.replace("'FILE'", repr(str(source)))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    assert subprocess.run(shell, shell=True, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    prepare(source=tmp_path / "texts.jsonl", out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(expected).tolist()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_a_key_inside_an_object_is_a_column(kind, tmp_path):
    rows = [{"text": "one"}, None, {"text": "two"}]
    write = {"parquet": write_parquet, "jsonl": write_jsonl, "arrow": write_feather_of}[kind]
    source = write(tmp_path / f"a.{kind}", rows)
    assert "--text_column of text.text" in refused("text", source=source, out=tmp_path / "out")
    prepare(source=source, text_column="text.text", out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(["one", "two"]).tolist()
    refused("choose a --text_column of", source=source, text_column="text.body", out=tmp_path / "two")


def write_feather_of(path, rows):
    with pa.ipc.new_file(path, pa.schema({"text": pa.struct({"text": pa.string()})})) as file:
        file.write(pa.record_batch({"text": rows}))
    return path


def test_a_missing_key_names_those_that_are_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"Text": "a", "id": 1}\n')
    out = tmp_path / "out"
    refused("line 1 has no key 'text': choose a --text_column of Text, id", source=tmp_path / "a.jsonl", out=out)
    (tmp_path / "a.csv").write_text("Text;id\na;1\n")
    refused("has no column 'text': choose a --text_column of", source=tmp_path / "a.csv", out=out)


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"id,text\n1,a, b\n", "line 2 has 3 fields and the first line 2"),
    ("a.csv", b'text\n"never closed\n', "line 3 is not CSV|line 2 is not CSV"),
    ("a.json", b'[{"text": "a"}, {"text": broken}]', "item 2 of its list is not JSON"),
    ("a.json", b'{"a": 1', "it is not JSON|is not a JSON object"),
    ("a.jsonl.gz", b'{"text": "a"}\n', "not compressed as its name says: rename it to a.jsonl"),
    ("a.arrow", b"nothing", "cannot be read"),
    ("a.txt", b"some\0thing", "it holds NUL bytes"),
    ("a.txt", b"%PDF-1.4 ...", "no text but a .pdf file: rename it to a.pdf"),
    ("a.jsonl", b"PK\x03\x04....", "no text but a .zip file"),
    ("a.txt", b"\n<!DOCTYPE html><p>", "it seems to be HTML"),
    ("a.txt", b'<?xml version="1.0"?>', "it seems to be XML"),
    ("a.txt", b'{"text": "a"}\n{"text": "b"}\n', "it seems to be JSON lines"),
    ("a.txt", b'{"content": "a"}\n{"content": "b"}\n', "it seems to be JSON lines"),
    ("a.txt", b'[{"text": "a"}]', "it seems to be JSON, not plain text: rename it to .json"),
    ("a.txt", b"id,text\n1,hello\n", "it seems to be a CSV table, not plain text: rename it to .csv"),
    ("a.txt", b"<mediawiki><page>a</page></mediawiki>", "it seems to be XML"),
    ("a.txt", LFS, "git lfs pull"), ("a.jsonl", LFS, "git lfs pull"), ("a.csv", LFS, "git lfs pull"),
    ("a.parquet", LFS, "git lfs pull"), ("a.arrow", LFS, "git lfs pull"),
    ("a.csv", b"text,text\n1,hello\n", "has 'text' twice: rename one"),
    ("a.csv", b"0,Hello\n1,you\n", "line 1, which has to name the columns, has no column 'text'"),
    ("a.csv", b'id,text\n1,"hello\n2,b\n3,c\n', "line 2 to 4 is not CSV"),
    ("a.csv", b'id,text\n1,"a \\"b\\" c"\n', r"if its quotes follow a backslash: .*escapechar=chr\(92\)"),
    ("a.tsv", b'id\ttext\n1\t"Hi" he said\n', "if its quotes are part of the texts: .*quoting=3"),
    ("a.jsonl", b'{\n "text": "a"\n}\n', "line 1 .* jq -c ."), ("a.json", b'{\n "text": "a"\n}\n{}', "jq -c ."),
])
def test_broken_files_name_the_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(message, source=tmp_path / name, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", [b"id,text\n", b"\n\nid,text\n", b"sep=,\r\nid,text\r\n", b'"id\nnumber",text\n',
                                  b"id, text\n", b"\xef\xbb\xbfsep=,\nid,text\n"])
def test_the_line_that_names_the_columns_is_found(head, tmp_path):
    blank = b" " if b", text" in head else b""
    (tmp_path / "a.csv").write_bytes(head + b'1,%b"one, two"\n2,%bthree\n' % (blank, blank))
    prepare(source=tmp_path / "a.csv", out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(["one, two", "three"]).tolist()


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("form", ["records", "columns", "index", "split", "table", "lists", "server", "strings",
                                  "lines"])
def test_json_in_every_form_in_which_tables_are_written(form, indent, tmp_path):
    """All forms of pandas' to_json() that name columns; Dataset.to_dict(); what the hub's viewer sends."""
    texts = ["one", "2021-01-01", "drei é 🙂"]
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    frame = pytest.importorskip("pandas").DataFrame(rows)
    made = {"lists": {"id": [0, 1, 2], "text": texts}, "strings": {"data": texts},
            "server": {"features": [{"name": "text"}], "rows": [{"row_idx": row["id"], "row": row} for row in rows]}}
    value = made[form] if form in made else None if form == "lines" else json.loads(frame.to_json(orient=form))
    lines = "\n".join(map(json.dumps, texts))
    (tmp_path / "a.json").write_text(lines if form == "lines" else json.dumps(value, indent=indent))
    column = "row.text" if form == "server" else "text"
    if form == "lines":
        (tmp_path / "a.json").rename(tmp_path / "a.jsonl")
    prepare(source=tmp_path, out=tmp_path / "out", text_column=column, **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(texts).tolist()


def test_one_json_object_is_one_row_and_a_list_in_a_line_is_no_table(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one", "tags": ["a", "b"], "parts": [{"x": "y"}]}')
    prepare(source=tmp_path / "a.json", out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(["one"]).tolist()
    for value in ({"text": ["a", "b"], "id": 1}, {"text": {"body": "a"}}):
        (tmp_path / "a.json").write_text(json.dumps(value))
        refused("under 'text'", source=tmp_path / "a.json", out=tmp_path / "two")
        (tmp_path / "a.json").write_text(json.dumps(value) + "\n" + json.dumps(value))
        refused("line 1 has a", source=tmp_path / "a.json", out=tmp_path / "two")


def test_a_parquet_file_without_rows_and_empty_files_are_no_obstacle(tmp_path):
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet", pa.array([], pa.string()))
    for name in ("b.jsonl", "b.csv", "b.json", "b.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    refused("there is no text in", source=tmp_path / "in", out=tmp_path / "out")
    write_jsonl(tmp_path / "in" / "c.jsonl", ["text"])
    prepare(source=tmp_path / "in", out=tmp_path / "out", max_tokens=10**12, **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(["text"]).tolist()


def test_marks_stay_text_and_are_said_once(tmp_path, capsys):
    texts = ["one\n<|endoftext|>\ntwo<|endoftext|>", "<|endoftext|>", "none", "end of text"]
    prepare(source=write_jsonl(tmp_path / "a.jsonl", texts), out=tmp_path / "out")
    said = capsys.readouterr().err
    assert tokens(tmp_path / "out") == plain_tokens(texts).tolist()
    assert said.count("<|endoftext|> 3 times") == 1
    (tmp_path / "FILE.txt").write_text(texts[0])
    shell = said[said.index("python -c"):].splitlines()[0].replace("python -c", f"{sys.executable} -c")
    assert subprocess.run(shell, shell=True, cwd=tmp_path).returncode == 0
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts[0].split("<|endoftext|>")


def test_json_lines_in_latin_1_are_warned_of(tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_bytes('{"text": "déjà vu, un été à la mer"}\n'.encode("latin-1"))
    prepare(source=source, out=tmp_path / "out", **FAST)
    assert "are U+FFFD, which stands for bytes that are not UTF-8" in capsys.readouterr().err
    prepare(source=write_jsonl(source, ["\ufffd " + "word " * 2000]), out=tmp_path / "two", **FAST)
    assert "U+FFFD" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Rows that cannot be read
# ---------------------------------------------------------------------------------------------------------------------

def test_bad_rows_are_skipped_counted_and_named_also_after_a_stop(tmp_path, capsys):
    lines = [json.dumps({"text": text}) for text in documents(110)]
    good = [json.loads(line)["text"] for i, line in enumerate(lines) if i % 10 != 7]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(line[:-2] if i % 10 == 7 else line for i, line in enumerate(lines)))
    line = refused("line 8 is not a JSON object", source=source, out=tmp_path / "out", shard_size=500)
    assert "--skip_bad_rows" in line
    kept = len(list((tmp_path / "out").glob("*.npy")))
    assert kept == len(plain_tokens(good[:7])) // 500  # all shards before the bad row
    for _ in range(2):
        prepare("--skip_bad_rows", source=source, out=tmp_path / "out", shard_size=500, **FAST)
        said = capsys.readouterr().err
        assert tokens(tmp_path / "out") == plain_tokens(good).tolist()
        assert manifest(tmp_path / "out")["skipped_rows"] == 11
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    for k in (0, 3, 20, kept + 9):
        min((tmp_path / "out").glob(f"*{k:06d}.npy")).unlink()
        prepare("--skip_bad_rows", source=source, out=tmp_path / "out", shard_size=500, **FAST)
        said = capsys.readouterr().err
        assert (tmp_path / "out" / "manifest.json").read_bytes() == before
        assert tokens(tmp_path / "out") == plain_tokens(good).tolist()
        assert said.count("skipped: ") <= 10 and (k or f"{source}: line 8 " in said)


def test_bad_records_of_a_table_are_skipped_too(tmp_path, capsys):
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,"one, two"\n2,a,b\n3,"x" y\n\n4,\xe9\n5,last\n')
    refused("line 3 has 3 fields", source=tmp_path / "a.csv", out=tmp_path / "out")
    prepare("--skip_bad_rows", source=tmp_path / "a.csv", out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(["one, two", "last"]).tolist()
    said = capsys.readouterr()
    assert "(3 bad rows skipped)" in said.out
    assert all(f"a.csv: line {line} " in said.err.replace(f"line {line}:", f"line {line} ") for line in (3, 4, 6))


def test_a_damaged_row_group_is_skipped_as_a_whole(tmp_path, capsys):
    texts = documents(900)
    source = write_parquet(tmp_path / "a.parquet", texts, row_group_size=300, compression="none", use_dictionary=False,
                           write_page_checksum=True)
    data = bytearray(source.read_bytes())
    place = data.index(texts[450].encode()[:200])
    data[place - 4:place + 8] = b"\xff" * 12  # the length of the text, too
    source.write_bytes(data)
    prepare("--skip_bad_rows", source=source, out=tmp_path / "out", shard_size=30_000, **FAST)
    skipped, said = manifest(tmp_path / "out")["skipped_rows"], capsys.readouterr().err
    assert f"rows {600 - skipped + 1} to 600 cannot be read" in said and 0 < skipped <= 300
    assert tokens(tmp_path / "out") == plain_tokens(texts[:600 - skipped] + texts[600:]).tolist()
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    min((tmp_path / "out").glob("*000005.npy")).unlink()
    prepare("--skip_bad_rows", source=source, out=tmp_path / "out", shard_size=30_000, **FAST)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert "--skip_bad_rows" in refused("cannot be read", source=source, out=tmp_path / "two")


def test_the_rest_of_a_file_that_is_cut_off_is_skipped(tmp_path, capsys):
    texts = documents(600)
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    cut = compressed(tmp_path / "in" / "a.jsonl.gz", lines.encode())
    cut.write_bytes(cut.read_bytes()[:-1000])
    (tmp_path / "in" / "b.parquet").write_bytes(b"no parquet")
    write_jsonl(tmp_path / "in" / "c.jsonl", ["last"])
    prepare("--skip_bad_rows", source=tmp_path / "in", out=tmp_path / "out", **FAST)
    found = tokens(tmp_path / "out")
    assert manifest(tmp_path / "out")["skipped_rows"] == 2
    assert found[-2:] == plain_tokens(["last"]).tolist() and found[:-2] == plain_tokens(texts).tolist()[:len(found) - 2]
    assert "counted as one" in capsys.readouterr().err


def test_of_a_file_that_is_cut_off_nearly_all_that_is_there_is_read(tmp_path):
    generator = np.random.default_rng(0)
    texts = [generator.bytes(100).hex() for _ in range(1000)]
    path = tmp_path / "a.jsonl.gz"
    compressed(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    path.write_bytes(path.read_bytes()[:-50])
    prepare("--skip_bad_rows", source=path, out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out").count(50256) > 900


# ---------------------------------------------------------------------------------------------------------------------
# The same source, and another
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def four_files(tmp_path):
    """Four files of texts, the third of which has a bad line, and (their folder, the good texts of each)."""
    parts = [documents(40, seed) for seed in range(4)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, part in enumerate(parts):
        write_jsonl(folder / f"{i}.jsonl", part)
    good = (folder / "2.jsonl").read_bytes()
    (folder / "2.jsonl").write_bytes(good.replace(b"}\n", b"\n", 30).replace(b"\n", b"}\n", 29))
    return folder, parts, good


def test_a_later_file_that_is_mended_keeps_every_finished_shard(four_files, tmp_path, capsys):
    folder, parts, good = four_files
    arguments = dict(source=folder, out=tmp_path / "out", shard_size=1000)
    refused("2.jsonl: line 30 ", **arguments)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    assert len(before) == len(plain_tokens(parts[0] + parts[1] + parts[2][:29])) // 1000
    (folder / "2.jsonl").write_bytes(good)
    (folder / "3.jsonl").write_bytes(write_jsonl(tmp_path / "new.jsonl", documents(9, 7)).read_bytes())
    write_jsonl(folder / "4.jsonl", documents(9, 8))
    prepare(**arguments, **FAST)
    assert "finished shards are of what is unchanged" in capsys.readouterr().out
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}.items()
    expected = plain_tokens(parts[0] + parts[1] + parts[2] + documents(9, 7) + documents(9, 8)).tolist()
    assert tokens(tmp_path / "out") == expected
    write_jsonl(folder / "5.jsonl", documents(9, 9))  # and more, when all is finished
    prepare(**arguments, **FAST)
    assert tokens(tmp_path / "out") == expected + plain_tokens(documents(9, 9)).tolist()
    prepare("--verify", out=tmp_path / "out")


def test_a_finished_folder_that_cannot_be_extended_yet_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", documents(9))
    prepare(source=tmp_path / "in", out=tmp_path / "out", **FAST)
    shard = (tmp_path / "out" / "in_val_000000.npy").read_bytes()
    (tmp_path / "in" / "b.jsonl").write_text("broken\n")
    for _ in range(2):
        refused("b.jsonl: line 1", source=tmp_path / "in", out=tmp_path / "out")
        assert (tmp_path / "out" / "in_val_000000.npy").read_bytes() == shard
    write_jsonl(tmp_path / "in" / "b.jsonl", documents(9, 5))
    prepare(source=tmp_path / "in", out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(documents(9) + documents(9, 5)).tolist()
    prepare("--verify", out=tmp_path / "out")


def test_shards_of_before_that_are_not_written_again_go(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", documents(20))
    write_jsonl(tmp_path / "in" / "b.jsonl", documents(40, 3))
    prepare(source=tmp_path / "in", out=tmp_path / "out", shard_size=500, **FAST)
    (tmp_path / "out" / "in_train_000001.npy").unlink()
    write_jsonl(tmp_path / "in" / "b.jsonl", ["short"])
    prepare(source=tmp_path / "in", out=tmp_path / "out", shard_size=500, **FAST)
    assert tokens(tmp_path / "out") == plain_tokens([*documents(20), "short"]).tolist()
    prepare("--verify", out=tmp_path / "out")


@pytest.mark.parametrize("change", ["early file", "early row", "a word", "rows move", "earlier name", "gone"])
def test_a_change_in_what_was_read_is_refused(change, four_files, tmp_path):
    folder, _, good = four_files
    arguments = dict(source=folder, out=tmp_path / "out", shard_size=1000)
    refused("2.jsonl: line 30 ", **arguments)
    if change == "early file":
        data = (folder / "0.jsonl").read_bytes()
        (folder / "0.jsonl").write_bytes(data[:30] + b"Z" + data[31:])  # of the same size
    elif change == "early row":
        (folder / "2.jsonl").write_bytes(good[:30] + b"Z" + good[31:])
    elif change == "a word":  # one token for another: everything stays in its place
        (folder / "2.jsonl").write_bytes(good.replace(b" the ", b" and ", 1))
    elif change == "rows move":
        (folder / "2.jsonl").write_bytes(b"\n" + good)
    elif change == "earlier name":
        write_jsonl(folder / "00.jsonl", ["new"])
    else:
        (folder / "1.jsonl").unlink()
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    refused("is not what .* was begun with", **arguments)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_the_same_source_under_another_name_continues(tmp_path, monkeypatch):
    texts = documents(60)
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "a.jsonl", texts[:30])
    write_jsonl(tmp_path / "texts" / "b.jsonl", texts[30:])
    prepare(source=tmp_path / "texts", out=tmp_path / "out", shard_size=1000, **FAST)
    shutil.copytree(tmp_path / "texts", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = manifest("out")
    for source in ("texts", "texts/", "./texts", "texts/../texts", "texts/*.jsonl", "elsewhere", "~/texts"):
        for k in (2, None):
            if k:
                min(Path("out").glob(f"*{k:06d}.npy")).unlink()
            prepare(source=source, out="out", shard_size=1000, **FAST)
            assert tokens("out") == plain_tokens(texts).tolist()
            assert {**manifest("out"), "source": None} == {**before, "source": None}
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", documents(30, 5))
    refused(r"out was made from .*, not from elsewhere", source="elsewhere", out="out", shard_size=1000)


def test_a_finished_folder_does_not_need_its_source(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(9))
    prepare(source=source, out=tmp_path / "out", **FAST)
    source.unlink()
    prepare(source=source, out=tmp_path / "out", **FAST)
    write_jsonl(source, documents(8))
    refused("is not what .* was begun with", source=source, out=tmp_path / "out")


@pytest.mark.parametrize("finished", [True, False])
def test_a_manifest_of_the_earlier_form_is_continued(finished, tmp_path):
    texts = documents(60)
    (tmp_path / "in").mkdir()
    source = write_jsonl(tmp_path / "in" / "a.jsonl", texts)
    (tmp_path / "in" / "notes.txt").write_text("which that version did not read")
    values = dict(source=tmp_path / "in", out=tmp_path / "out", shard_size=1000)
    prepare(source=source, out=tmp_path / "out", shard_size=1000, **FAST)
    record = manifest(tmp_path / "out")
    record["files"] = [[source.as_posix(), source.stat().st_size]]
    record.pop("skipped_rows")
    for shard in record["shards"]:
        del shard["skipped"], shard["file_tokens"]
    (tmp_path / "out" / "manifest.json").unlink()
    if not finished:
        record["shards"] = record["shards"][:3]
        for path in sorted((tmp_path / "out").glob("*train*"))[2:]:
            path.unlink()
    (tmp_path / "out" / ("manifest.json" if finished else "progress.json")).write_text(json.dumps(record))
    prepare(**values, **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(texts).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Failed tries
# ---------------------------------------------------------------------------------------------------------------------

def test_a_try_without_a_shard_binds_nobody_and_leaves_nothing(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(9))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no json\n")
    refused("has no key 'body'", source=source, out=tmp_path / "out", text_column="body")
    refused("line 1 is not a JSON", source=bad, out=tmp_path / "out", shard_size=7)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()  # what a kill leaves
    settings = {"source": "x/y", "revision": "123", "text_column": "body", "shard_size": 7, "max_tokens": 0,
                "tokenizer": "gigatoken", "node_rank": 0, "num_nodes": 1, "files": [["hf://x", 1]], "shards": []}
    (tmp_path / "out" / "progress.json").write_text(json.dumps(settings))
    (tmp_path / "out" / ".lock0").touch()
    np.save(tmp_path / "out" / "killed.npy", np.zeros(3, np.uint16))  # before it was recorded
    (tmp_path / "out" / "killed.npy").rename(tmp_path / "out" / "edufineweb_val_000000.npy")
    prepare(source=source, out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(documents(9)).tolist()
    for path in (tmp_path / "out").glob("*.*n*"):
        path.unlink()
    (tmp_path / "out" / "progress.json").write_text(json.dumps(settings))
    assert not has_shards(tmp_path / "out")
    prepare(source=source, out=tmp_path / "out", **FAST)
    assert tokens(tmp_path / "out") == plain_tokens(documents(9)).tolist() and has_shards(tmp_path / "out")


def test_a_folder_without_shards_does_not_block_the_demo(tmp_path, monkeypatch):
    import train_gpt2

    monkeypatch.chdir(tmp_path)
    (tmp_path / "edu_fineweb10B").mkdir()
    (tmp_path / "edu_fineweb10B" / ".lock0").touch()
    (tmp_path / "edu_fineweb10B" / "progress.json").touch()
    assert train_gpt2.parse_args([]).data.endswith("input.txt")
    np.save(tmp_path / "edu_fineweb10B" / "edufineweb_val_000000.npy", np.zeros(3, np.uint16))
    assert train_gpt2.parse_args([]).data == "edu_fineweb10B"


# ---------------------------------------------------------------------------------------------------------------------
# Names of datasets
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, expected", [
    ("a/b", ("a/b",)), ("a/b/c/d", ("a/b", None, "c/d")), ("a/b@main/c", ("a/b", "main", "c")),
    ("a/b@refs/convert/parquet/default/train", ("a/b", "refs/convert/parquet", "default/train")),
    ("a/b@refs/pr/12", ("a/b", "refs/pr/12")), ("a/b@refs%2Fconvert%2Fparquet/x", ("a/b", "refs/convert/parquet", "x")),
    ("a/b@my%2Fbranch/x", ("a/b", "my/branch", "x")), ("datasets/a/b", ("a/b",)),
    ("hf://datasets/a/b@refs/pr/1/x.parquet", ("a/b", "refs/pr/1", "x.parquet")), ("hf://datasets/a/b", ("a/b",)),
    ("https://huggingface.co/datasets/a/b", ("a/b",)), ("https://huggingface.co/datasets/a/b/", ("a/b",)),
    ("https://huggingface.co/datasets/a/b/tree/main/c%20d", ("a/b", "main", "c d")),
    ("https://huggingface.co/datasets/a/b/tree/refs%2Fconvert%2Fparquet/x", ("a/b", "refs/convert/parquet", "x")),
    ("https://huggingface.co/datasets/a/b/tree/refs%2Fpr%2F3", ("a/b", "refs/pr/3")),
    ("https://huggingface.co/datasets/a/b/resolve/main/x.parquet?download=true", ("a/b", "main", "x.parquet")),
    ("https://huggingface.co/datasets/a/b/blob/main/x.jsonl#L3", ("a/b", "main", "x.jsonl")),
    ("huggingface.co/datasets/a/b/viewer", ("a/b",)), ("https://hf.co/datasets/a/b", ("a/b",)),
    ("https://huggingface.co/a/b", None), ("wikitext", None), ("hf://a/b", None), ("https://example.com/a/b", None),
    ("a/b/tree/main/c", ("a/b", "main", "c")), ("a/b/resolve/refs%2Fpr%2F1/x.json", ("a/b", "refs/pr/1", "x.json")),
    ("datasets/a/b/blob/main/x.parquet", ("a/b", "main", "x.parquet")), ("a/b/raw/x", ("a/b", None, "raw/x")),
    ("datasets/wikitext", None), ("/a/b", None), ("a//b", None)])
def test_names_of_datasets(name, expected):
    dataset = parse_dataset(name)
    assert dataset == (Dataset(*expected) if expected else None)
    assert dataset is None or parse_dataset(dataset.name) == dataset


@pytest.mark.parametrize("source, message", [
    ("data/my_text", "does not exist: did you mean 'data/my_texts'"), ("./texts", "does not exist"),
    ("../data/x.jsonl", "does not exist"), ("~/nothing", "does not exist"), ("/nothing/here", "does not exist"),
    ("some/file.jsonl", "does not exist; a dataset of that name on the hub is --source hf://datasets/some/file.jsonl"),
    ("some/file.zip", "does not exist"), ("wikitext", "a dataset on the hub is OWNER/NAME"),
    ("https://example.com/a.jsonl", "curl -LO https://example.com/a.jsonl"), ("s3://bucket/a", "aws s3 cp"),
    ("https://huggingface.co/openai-community/gpt2", "its address is hf://datasets/OWNER/NAME"),
    ("hf://openai-community/gpt2", "its address is hf://datasets/OWNER/NAME"), ("hf://datasets/wikitext", "OWNER/NAME"),
    (" a/b ", "does not exist: did you mean 'a/b'?"),
    ("'a/b'", "does not exist: did you mean 'a/b'?"), ("a/b:train", "is named by its folder or file, a/b/PATH"),
    ("a/b[train]", "is named by its folder or file, a/b/PATH"), ("a/b,en", "is named by its folder or file, a/b/PATH"),
    ("a/b/data/*.parquet", "is named by its folder or file, a/b/PATH"),
    ("hf://datasets/a/b@x/data/*.parquet", "name one file or folder of it, such as a/b@x/data"),
    ("file:///tmp/a%20b.txt", "is on this disk: name it as '/tmp/a b.txt'"),
    ("data/*.jsonl", "no file matches"), ("data/my_texts", "there are no files in data/my_texts")])
def test_a_mistyped_path_is_told_from_a_dataset_without_a_network(source, message, tmp_path, monkeypatch):
    (tmp_path / "data" / "my_texts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plumbing.sources.patiently", lambda *_, **__: pytest.fail("asked the hub"))
    assert message in refused("--source", source=source, out="out") and not Path("out").exists()


def test_datasets_are_read_under_all_their_names_and_continue(tmp_path, monkeypatch):
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    write_parquet(folder / "data" / "a.parquet", ["parquet"])
    (folder / "data" / "b.txt").write_text("a document")
    write_csv(folder / "data" / "c.csv", ["table"])
    with hub({"datasets/some/texts": folder}, tmp_path / "cache") as (environment, _):
        use_here(environment, monkeypatch)
        names = ["some/texts/data", "hf://datasets/some/texts/data", f"some/texts@{COMMIT}/data",
                 "https://huggingface.co/datasets/some/texts/tree/main/data"]
        for name in names:
            prepare(source=name, out=tmp_path / "out", **FAST)
        assert tokens(tmp_path / "out") == plain_tokens(["parquet", "a document", "table"]).tolist()
        prepare(source="some/texts@refs/convert/parquet/data/b.txt", out=tmp_path / "one", **FAST)
        assert tokens(tmp_path / "one") == plain_tokens(["a document"]).tolist()


@pytest.mark.parametrize("status, code, advice", [(403, "GatedRepo", "accept its conditions"),
                                                  (401, "RepoNotFound", "hf auth login")])
def test_a_dataset_that_is_gated_or_private_says_what_to_do(status, code, advice, tmp_path, monkeypatch):
    with hub({}, tmp_path / "cache") as (environment, handler):
        def reply(self, data, status_=0, **_):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        handler.reply, handler.trouble = reply, None
        waits = use_here(environment, monkeypatch)
        assert "\n" not in refused(advice, source="some/texts", out=tmp_path / "out")
    assert waits == [] and not (tmp_path / "out").exists()


def test_the_command_that_continues_can_be_typed():
    config = fineweb.FineWebConfig(source="my texts", skip_bad_rows=True)
    assert shlex.split(config.command)[2:] == ["--source", "my texts", "--skip_bad_rows"]
    assert fineweb_command(source="x")
