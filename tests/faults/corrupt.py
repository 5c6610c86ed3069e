"""Flipped bits, truncations and foreign files: named, with the checkpoint before it used instead, or harmless."""
import contextlib
import hashlib
import io
import random
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from helpers import ROOT, flags, run, write_shards
from faults.common import Row, finish, said, start

from plumbing import checkpoint
from plumbing import cli
from plumbing import files
from plumbing import manifest, shards
import train_gpt2

SHAPE = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=50304)


def content(value) -> str:
    """A text that is equal for equal states, bit by bit."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{content(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(content, value)) + "]"
    return repr(value)


def write_run(folder: Path) -> Path:
    """A run folder with checkpoints of steps 2 and 4 -> the newer one."""
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**SHAPE))
    moments = {i: {"exp_avg": torch.randn_like(p)} for i, p in enumerate(model.parameters())}
    folder.mkdir()
    for step in (2, 4):
        path = checkpoint.save(folder, step, {
            "model": model.state_dict(), "optimizers": [{"state": moments, "param_groups": [{"lr": 0.1 * step}]}],
            "model_config": SHAPE, "train_config": {"seed": 1337, "data": "edu_fineweb10B"}, "step": step,
            "scaler": {}, "val_loss": 10.5, "evaluated": True})
    return path


def regions(path: Path) -> list[tuple[str, int, int]]:
    """(name, first byte, byte after the last) of every part of a checkpoint, the bytes between the parts too."""
    found, at = [], 0
    with zipfile.ZipFile(path) as archive:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
            with open(path, "rb") as file:
                file.seek(entry.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            data = entry.header_offset + 30 + name + extra
            kind = "tensors" if "/data/" in entry.filename else entry.filename.partition("/")[2]
            found += [("between", at, entry.header_offset), ("headers", entry.header_offset, data),
                      (kind, data, data + entry.file_size)]
            at = data + entry.file_size
        found += [("between", at, archive.start_dir), ("directory", archive.start_dir, path.stat().st_size)]
    return [region for region in found if region[2] > region[1]]


def checkpoints(flips: int = 200, cuts: int = 50, seed: int = 1) -> list[Row]:
    """Random single bits of every region, and truncations anywhere, through what training reads a checkpoint with."""
    chance, outcomes = random.Random(seed), {"refused": 0, "equal": 0}
    with tempfile.TemporaryDirectory() as home:
        path = write_run(Path(home) / "run")
        good, before = content(checkpoint.load(path)), content(checkpoint.load(path.with_name("model_000002.pt")))
        data, parts = path.read_bytes(), regions(path)
        names = sorted({name for name, _, _ in parts})

        def judge(spoilt: bytes, what: str) -> None:
            path.write_bytes(spoilt)
            told = io.StringIO()
            with contextlib.redirect_stdout(told):
                chosen = checkpoint.newest(path.parent)
            state = checkpoint.load(chosen)
            if chosen == path:
                assert content(state) == good, f"{what}: another state was loaded without a word"
                outcomes["equal"] += 1
            else:
                assert path.name in told.getvalue() and content(state) == before, f"{what}: {told.getvalue()}"
                outcomes["refused"] += 1

        for i in range(flips):
            name = names[i % len(names)]
            _, first, end = chance.choice([part for part in parts if part[0] == name])
            position, bit = chance.randrange(first, end), chance.randrange(8)
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            judge(bytes(flipped), f"bit {bit} of byte {position} in {name}")
        flipped_outcomes = dict(outcomes)
        for size in [*(chance.randrange(len(data)) for _ in range(cuts - 4)), 0, 1, len(data) - 1, len(data) - 22]:
            judge(data[:size], f"cut to {size} bytes")
        assert outcomes["equal"] == flipped_outcomes["equal"], "a truncated checkpoint was loaded"
        others = [ROOT / "input.txt", ROOT / "docs" / "demo.png"]
        for other in others:
            judge(other.read_bytes(), other.name)
        torch.save({"model": torch.zeros(3)}, path)
        judge(path.read_bytes(), "another program's .pt")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.txt", "a zip file")
        judge(path.read_bytes(), "a zip file")
    return [Row(f"a bit flipped in a checkpoint: {', '.join(names)} in turn", flips,
                f"{flipped_outcomes['refused']} named, and the checkpoint before it used; {flipped_outcomes['equal']} "
                "loaded the same state, bit by bit"),
            Row("a checkpoint truncated, empty, or another program's file", cuts + len(others) + 2,
                "all named, and the checkpoint before it used")]


def by_command() -> list[Row]:
    """The same through the real command: the newest is spoilt in three ways, training goes on from the one before."""
    with tempfile.TemporaryDirectory() as home:
        arguments = flags(data=write_shards(Path(home) / "data"), out_dir=Path(home) / "run", keep_checkpoints=9)
        finish(start(arguments))
        path = Path(home) / "run" / "model_000006.pt"
        data = path.read_bytes()
        for spoilt in (data[:-1000], b"", data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]):
            path.write_bytes(spoilt)
            process = start(arguments)
            assert "model_000006.pt is not a whole checkpoint" in finish(process)
            assert "resumed after step 4" in said(process)
    return [Row("the newest checkpoint cut, emptied, flipped; the real command", 3,
                "named, resumed from the one before")]


def token_shards(flips: int = 200, seed: int = 1) -> list[Row]:
    """Random bits of shards: all of the header, and of the tokens; with fineweb.py's manifest and without."""
    chance, outcomes = random.Random(seed), {"refused": 0, "equal": 0, "verify": 0}
    with tempfile.TemporaryDirectory() as home:
        folder, source = Path(home) / "data", Path(home) / "text.jsonl"
        source.write_text("".join('{"text": "%s"}\n' % ("some words of a text " * 20 + str(i)) for i in range(200)))
        result = run(["--source", source, "--out", folder, "--shard_size", "5000", "--max_tokens", "15000"],
                     script=ROOT / "fineweb.py")
        assert result.returncode == 0, result.stderr
        path = sorted(folder.glob("*train*.npy"))[0]
        data, tokens = path.read_bytes(), np.load(path)
        for i in range(flips):
            position = chance.randrange(128) if i % 2 else chance.randrange(128, len(data))
            flipped = bytearray(data)
            flipped[position] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            try:
                loaded = dict(shards.open_tokens(folder, "train"))[str(path)][:]
                if position < 128:
                    assert np.array_equal(loaded, tokens), f"byte {position} of the header"
                    outcomes["equal"] += 1
                else:  # a token among 50,257 looks like another: only its hash tells
                    refused = run_verify(folder)
                    assert path.name in refused, refused
                    outcomes["verify"] += 1
            except files.DataError as error:
                assert path.name in str(error)
                outcomes["refused"] += 1
        for size in [*(chance.randrange(len(data)) for _ in range(20)), 0, len(data) - 2]:
            path.write_bytes(data[:size])
            for manifest in ("manifest.json", "none"):
                try:
                    shards.open_tokens(folder, "train")
                    raise AssertionError(f"a shard cut to {size} bytes was opened")
                except files.DataError as error:
                    assert path.name in str(error)
                if manifest != "none":
                    (folder / manifest).rename(folder / "set_aside")
            (folder / "set_aside").rename(folder / "manifest.json")
        path.unlink()
        try:
            shards.open_tokens(folder, "train")
            raise AssertionError("a missing shard was not missed")
        except files.DataError as error:
            assert f"{path.name} is missing" in str(error)
    return [Row("a bit flipped in a shard: header and tokens in turn", flips,
                f"{outcomes['refused']} refused by name before training, {outcomes['equal']} harmless (padding of the "
                f"header), {outcomes['verify']} in tokens found by fineweb.py --verify"),
            Row("a shard truncated, with the manifest and without, or gone", 45, "refused by name before training")]


def run_verify(folder: Path) -> str:
    """What --verify says of a folder that is not whole."""
    try:
        manifest.verify(folder)
        raise AssertionError("verify found nothing")
    except files.DataError as error:
        return str(error)


def exports(flips: int = 200, seed: int = 1) -> list[Row]:
    """Random bits of an exported folder's files, through what every --model and --init_from reads it with."""
    chance, outcomes = random.Random(seed), {"refused": 0, "equal": 0}
    with tempfile.TemporaryDirectory() as home:
        write_run(Path(home) / "run")
        folder = Path(home) / "out"
        result = run([Path(home) / "run", folder], script=ROOT / "export_hf.py")
        assert result.returncode == 0, result.stderr
        good = content(train_gpt2.GPT.load(folder).state_dict())
        names = ["model.safetensors", "config.json", "SHA256SUMS", "vocab.json"]
        whole = {name: (folder / name).read_bytes() for name in names}
        for i in range(flips):
            name = list(whole)[i % len(whole)]
            data = bytearray(whole[name])
            if i % 8 < 4 and name.endswith("safetensors"):  # its header, too
                data[chance.randrange(600)] ^= 1 << chance.randrange(8)
            else:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            (folder / name).write_bytes(data)
            try:
                assert content(train_gpt2.GPT.load(folder).state_dict()) == good, f"{name}: another model was loaded"
                outcomes["equal"] += 1
            except (OSError, cli.UserError) as error:
                assert str(folder) in str(error)
                outcomes["refused"] += 1
            (folder / name).write_bytes(whole[name])
        for name in whole:
            for size in (0, len(whole[name]) // 2, len(whole[name]) - 1):
                (folder / name).write_bytes(whole[name][:size])
                try:
                    assert content(train_gpt2.GPT.load(folder).state_dict()) == good and name == "SHA256SUMS"
                except (OSError, cli.UserError):
                    pass
            (folder / name).write_bytes(whole[name])
        shutil.rmtree(folder)
    return [Row(f"a bit flipped in an exported folder: {', '.join(whole)} in turn; and truncations",
                flips + 3 * len(whole), f"{outcomes['refused']} refused, {outcomes['equal']} loaded the same model")]


def corrupt(flips: int = 200, cuts: int = 50) -> list[Row]:
    """All of it."""
    return [*checkpoints(flips, cuts), *by_command(), *token_shards(flips), *exports(flips)]
