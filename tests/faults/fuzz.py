"""Bad input by the thousand: each ends in success or in one line and exit code 2, and writes nothing elsewhere."""
import collections
import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import string
import tempfile
import threading
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
from helpers import ROOT, TINY, make_loader, run, write_shards
from faults.common import Row
from faults.fuzz_data import fuzz_data, npy
from faults.fuzz_models import fuzz_models
from hypothesis import HealthCheck, Phase, given, seed, settings

from plumbing import transformers_format
import hellaswag
from plumbing import cli
from plumbing.manifest import read_record
from plumbing.texts import read_texts
import train_gpt2
from train_gpt2 import TrainConfig

WORDS = st.one_of(
    st.text(max_size=8), st.text(string.printable, max_size=8), st.integers(-2**70, 2**70).map(str),
    st.floats().map(str), st.sampled_from(["", "-", "--", "=", "0", "-1", "1e400", "nan", "inf", "None", "true", "..",
                                           "/", "/dev/null", "\0", "￿", "gpt2-xl", "cpu", "cuda:99", "*", "%s", "{}"]))
NAMES = st.sampled_from([*TrainConfig.__dataclass_fields__, "help", "no-compile", "nonsense", "data", "model"])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8)
COSTLY = {"max_steps", "total_batch_size", "val_tokens", "n_layer", "n_embd", "n_head", "sequence_length", "compile",
          "device", "logger", "hellaswag_every", "hellaswag_data", "hellaswag_limit", "sample_every", "out_dir"}
BESIDE = re.compile(r"^(warning|note): |\[\d\d:\d\d[<,]")  # what may stand on stderr: these, and progress bars


class Fuzz:
    """A folder in which each case runs, and what came of the cases."""

    def __init__(self, home: Path):
        self.home, self.out, self.outcomes, self.runs = home, home / "out", collections.Counter(), 0
        (home / "inputs").mkdir()
        self.shards = write_shards(home / "inputs" / "shards")
        self.text = home / "inputs" / "text.txt"
        self.text.write_text("A line of text, and then some more. " * 60)

    def listing(self) -> dict[str, tuple]:
        """Everything outside the output folder, with size and time."""
        return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in self.home.rglob("*")
                if not path.is_relative_to(self.out)}

    def fresh(self, name: str) -> Path:
        """An empty folder of this name in the output folder."""
        shutil.rmtree(self.out / name, ignore_errors=True)
        (self.out / name).mkdir(parents=True)
        return self.out / name

    def call(self, kind: str, main, *arguments):
        """Run something as a command, in this process: what it returns, or None after one line and exit code 2."""
        before, here, result = self.listing(), os.getcwd(), None
        stdout, stderr, code = io.StringIO(), io.StringIO(), 0
        os.chdir(self.home)
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                result = cli.run_command(main, *arguments)
        except SystemExit as error:
            code = error.code or 0
        finally:
            os.chdir(here)
        lines = [line for line in stderr.getvalue().strip().splitlines() if line and not BESIDE.search(line)]
        assert code in (0, 2), f"{kind} {arguments}: exit code {code}: {lines}"
        assert code == 0 or (len(lines) == 1 and lines[0].startswith("error: ")), f"{kind} {arguments}: {lines}"
        assert self.listing() == before, f"{kind} {arguments}: wrote outside its folder"
        self.outcomes[kind, code] += 1
        return result

    def by_command(self, kind: str, script: str, arguments: list[str]) -> None:
        """The same in a process of its own."""
        before = self.listing()
        result = run(arguments, cwd=self.home, script=ROOT / script)
        lines = result.stderr.strip().splitlines()
        assert result.returncode in (0, 2), f"{arguments}: {result.returncode}: {result.stderr}"
        assert result.returncode == 0 or lines[-1].startswith("error: "), f"{arguments}: {lines}"
        assert "Traceback" not in result.stderr, result.stderr
        assert self.listing() == before, f"{arguments}: wrote outside its folder"
        self.outcomes[kind, result.returncode] += 1


def command_line(fuzz: Fuzz, flags) -> list[str]:
    """A run of one step, with these flags over it."""
    base = {**TINY, "max_steps": 1, "val_every": 0, "checkpoint_every": 0, "val_tokens": 32, "data": fuzz.shards}
    words = [word for name, value in base.items() for word in (f"--{name}", str(value))]
    words += [word for pair in flags for word in pair]
    fuzz.runs += 1
    return [*words, "--out_dir", str(fuzz.out / f"run{fuzz.runs}")]


def is_cheap(argv: list[str]) -> bool:
    """Whether a command line is refused, or asks for no more work than a test has time for."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # --help
            config = train_gpt2.parse_args(argv)
    except (cli.UserError, SystemExit):
        return True
    return (config.max_steps <= 1 and config.n_layer <= 4 and config.n_embd <= 64 and config.sequence_length <= 256
            and config.total_batch_size <= 4096 and not config.compile and config.device in ("cpu", "auto")
            and config.logger in ("", "tensorboard") and config.data not in ("/", "..")
            and config.model in ("gpt2", "demo") and not config.init_from.startswith("gpt2"))


RECORD = {"name": "x_train.npy", "documents": 1, "tokens": 9, "bytes": 146, "sha256": "0" * 64, "next": [0, 0, 0]}


def write_model(folder: Path) -> dict:
    """A small model in transformers' layout -> its config.json."""
    folder.mkdir(parents=True)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=2))
    transformers_format.write_transformers(folder, vars(model.config), model.state_dict(), {})
    return json.loads((folder / "config.json").read_text())


def property_test(examples: int, number: int, **given_values):
    """A decorator for a test with so many examples of random values, drawn with this seed."""
    return lambda body: seed(number)(settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck))(given(**given_values)(body)))


def fuzz_in_process(cases: int, number: int = 1) -> Row:
    """Random command lines, shards, texts, JSON lines and configurations, through each reader in this process."""
    with tempfile.TemporaryDirectory() as home:
        fuzz = Fuzz(Path(home))
        test = functools.partial(property_test, cases // 5, number)

        @test(flags=st.lists(st.tuples(NAMES.map("--{}".format), WORDS), max_size=3))
        def command_lines(flags):
            argv = command_line(fuzz, flags)
            if is_cheap(argv):
                fuzz.call("command line", lambda: train_gpt2.main(train_gpt2.parse_args(argv)))
            else:
                fuzz.call("command line, read only", train_gpt2.parse_args, argv)

        @test(data=st.binary(max_size=300), name=st.sampled_from(["x_train.npy", "x_train.bin", "train.bin"]),
              head=st.sampled_from([b"", b"\x93NUMPY\x01\x00v\x00", b"\x93NUMPY", npy(np.arange(40, dtype=np.uint16)),
                                    np.array([20240520, 1, 40], dtype=np.int32).tobytes()]))
        def shard_headers(data, name, head):
            folder = fuzz.out / "shards"
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                path.unlink()
            (folder / name).write_bytes(head + data)
            fuzz.call("shard", lambda: make_loader(folder, "train", 2, 4).batch(0))

        @test(data=st.one_of(st.binary(max_size=400), st.text(min_size=60, max_size=200).map(str.encode)))
        def texts(data):
            path = fuzz.out / "text.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            fuzz.call("text file", lambda: make_loader(path, "val", 1, 2).batch(0))

        @test(lines=st.lists(st.one_of(
            JSON.map(json.dumps).map(str.encode), st.binary(max_size=40),
            st.fixed_dictionaries({"text": JSON}).map(json.dumps).map(str.encode),
            st.fixed_dictionaries({"ctx": JSON, "endings": JSON, "label": JSON}).map(json.dumps).map(str.encode)),
            max_size=4))
        def json_lines(lines):
            path = fuzz.out / "lines.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"\n".join(lines))
            fuzz.call("HellaSwag file", lambda: list(hellaswag.iterate_examples(path=path)))
            stop = threading.Event()
            fuzz.call("JSON lines", lambda: list(read_texts([str(path)], "text", (0, 0), False, (0, ""), stop)))

        folder = fuzz.out / "model"
        good = write_model(folder)
        good_manifest = {"node_rank": 0, "num_nodes": 1, "source": "x", "shards": [RECORD]}

        @test(config=changed(good), manifest=st.one_of(
            changed(good_manifest), changed(RECORD).map(lambda shard: {**good_manifest, "shards": [shard]})))
        def configurations(config, manifest):
            (folder / "config.json").write_text(json.dumps(config))
            fuzz.call("config.json", train_gpt2.GPT.load, folder)
            (folder / "manifest.json").write_text(json.dumps(manifest))
            fuzz.call("manifest", read_record, folder / "manifest.json")

        for each in (command_lines, shard_headers, texts, json_lines, configurations):
            each()
    return said("bad input in process, by hypothesis", fuzz)


def fuzz_what_people_bring(cases: int, number: int = 1) -> Row:
    """So many of each: token files, texts, sources of fineweb.py, models of others; compared with plain references."""
    with tempfile.TemporaryDirectory() as home:
        fuzz = Fuzz(Path(home))
        test = functools.partial(property_test, cases, number)
        fuzz_data(fuzz, test)
        fuzz_models(fuzz, test)
    return said("what people bring, by hypothesis, compared with tiktoken, transformers and plain loops", fuzz)


def changed(good: dict):
    """Any JSON, or what is good with up to two of its values changed, as a strategy."""
    return st.one_of(JSON, st.dictionaries(st.sampled_from(sorted(good)), JSON, max_size=2).map(lambda new: good | new))


def said(name: str, fuzz: Fuzz) -> Row:
    """The line for docs/faults.md."""
    kinds = sorted({kind for kind, _ in fuzz.outcomes})
    parts = [f"{kind}: {fuzz.outcomes[kind, 2]} refused, {fuzz.outcomes[kind, 0]} taken" for kind in kinds]
    return Row(name, fuzz.outcomes.total(),
               f"one line and code 2, or success; nothing written elsewhere ({'; '.join(parts)})")


def fuzz_by_command(cases: int, number: int = 1) -> Row:
    """Random command lines and files through the real commands."""
    chance = random.Random(number)
    junk = ["", "-1", "nan", "1e400", "\x7f", "none", "😀", "--", "cuda:9", "/dev/null", "9" * 30]
    with tempfile.TemporaryDirectory() as home:
        fuzz = Fuzz(Path(home))
        fuzz.out.mkdir()
        for i in range(cases):
            out = fuzz.out / str(i)
            damaged = bytes(chance.randrange(256) for _ in range(chance.randrange(300)))
            name = chance.choice(["bad.jsonl", "bad.txt", "bad.parquet", "x_train.npy", "bad.pt", "bad.jsonl.gz"])
            (fuzz.out / "bad").mkdir(exist_ok=True)
            for path in (fuzz.out / "bad").iterdir():
                path.unlink()
            bad = fuzz.out / "bad" / name
            bad.write_bytes(damaged)
            fuzz_command(fuzz, i % 6, bad, out, chance, junk)
    return said("bad input by command", fuzz)


def fuzz_command(fuzz: Fuzz, which: int, bad: Path, out: Path, chance: random.Random, junk: list[str]) -> None:
    """One case of fuzz_by_command()."""
    if which == 0:
        name = chance.choice(sorted(set(TrainConfig.__dataclass_fields__) - COSTLY))
        fuzz.by_command("train_gpt2.py", "train_gpt2.py", command_line(fuzz, [(f"--{name}", chance.choice(junk))]))
    elif which == 1:
        data = bad if chance.random() < 0.5 else bad.parent
        fuzz.by_command("train_gpt2.py --data", "train_gpt2.py", command_line(fuzz, [("--data", str(data))]))
    elif which == 2:
        fuzz.by_command("fineweb.py", "fineweb.py", ["--source", str(bad), "--out", str(out), "--shard_size", "1000"])
    elif which == 3:
        fuzz.by_command("hellaswag.py", "hellaswag.py", ["--model", str(bad), "--data", str(bad), "--device", "cpu"])
    elif which == 4:
        fuzz.by_command("generate.py", "generate.py", ["--model", str(bad.parent), "--device", "cpu"])
    else:
        fuzz.by_command("plot.py, export_hf.py", *chance.choice([("plot.py", [str(bad.parent)]),
                                                                 ("export_hf.py", [str(bad), str(out)])]))


def fuzz(in_process: int = 100, by_command: int = 6, brought: int = 5) -> list[Row]:
    """All of it."""
    return [fuzz_in_process(in_process), fuzz_what_people_bring(brought), fuzz_by_command(by_command)]

