"""Inf and NaN in one rank's loss or gradient: no weight changes anywhere, and five in a row stop the run."""
import tempfile
from pathlib import Path

import torch
from helpers import flags, read_log, write_shards
from faults.common import Row, checkpoint_steps, finish, start

from plumbing import checkpoint


def skipped(value: str, where: str, optimizer: str, ranks: int, dtype: str = "float32") -> None:
    """One bad step, the fourth: the weights after it are those before it, on every rank, and training goes on."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        process = start(flags(data=write_shards(Path(home) / "data"), out_dir=folder, optimizer=optimizer, dtype=dtype,
                              micro_batch_size=4 // ranks, checkpoint_every=1, keep_checkpoints=9), ranks,
                        f"{value}:{where}:7:rank{ranks - 1}", WEIGHTS=str(Path(home) / "weights"))
        finish(process)
        lines = read_log(folder, "train")
        assert [line["step"] for line in lines if line.get("skipped")] == [4]
        hashes = [path.read_text().split() for path in sorted(Path(home).glob("weights.*"))]
        assert len(hashes) == ranks and all(rank == hashes[0] for rank in hashes) and len(hashes[0]) == 6
        assert hashes[0][2] == hashes[0][3], "the step that was skipped changed a weight or a moment"
        assert len(set(hashes[0])) == 5
        assert checkpoint_steps(folder) == [1, 2, 3, 4, 5, 6]
        assert equal(folder, 3, 4) and not equal(folder, 4, 5)
        if dtype == "float16":
            assert [line["scale"] for line in lines] == [65536] * 4 + [32768] * 2


def finite(weight: torch.Tensor) -> bool:
    """Whether a tensor holds neither inf nor nan."""
    return bool(torch.isfinite(weight).all())


def equal(folder: Path, a: int, b: int) -> bool:
    """Whether the weights after two steps are the same, bit by bit."""
    a, b = (checkpoint.load(folder / f"model_{step:06d}.pt")["model"] for step in (a, b))
    return all(torch.equal(a[key], b[key]) for key in a)


def five_in_a_row(optimizer: str, ranks: int) -> None:
    """From the fourth step on every loss is bad: the run stops, says where, and the last good checkpoint stays."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        arguments = flags(data=write_shards(Path(home) / "data"), out_dir=folder, optimizer=optimizer, max_steps=20,
                          micro_batch_size=4 // ranks, checkpoint_every=3, keep_checkpoints=1)
        process = start(arguments, ranks, f"nan:gradient:7x99:rank{ranks - 1}")
        output = finish(process, code=1)
        for words in ("five steps in a row without a finite loss and gradient, the last one step 8", "norm nan",
                      "at 1,024 tokens"):
            assert words in output, output[-1500:]
        lines = read_log(folder, "train")
        assert [bool(line.get("skipped")) for line in lines] == [False] * 3 + [True] * 5
        assert checkpoint_steps(folder) == [3, 6, 8] and equal(folder, 3, 8)  # with --keep_checkpoints 1


def bad_weights() -> None:
    """An update puts an inf into the weights, in a step after which a checkpoint is due: none ever holds it."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        arguments = flags(data=write_shards(Path(home) / "data"), out_dir=folder, checkpoint_every=1, max_steps=20)
        output = finish(start(arguments, 1, "inf:weights:4"), code=1)
        assert "after step 4 transformer.wte.weight is not finite: no checkpoint of it is kept" in output
        assert "five steps in a row" in output and checkpoint_steps(folder) == [2, 3]
        assert all(map(finite, checkpoint.load(folder / "model_000003.pt")["model"].values()))


def not_finite(few: bool = False) -> list[Row]:
    """All of it, or one of each kind."""
    cases = [(value, where, optimizer, ranks) for optimizer in ("adamw", "muon") for ranks in (1, 2)
             for value in ("nan", "inf") for where in ("loss", "gradient")]
    cases += [("inf", "gradient", optimizer, 2, "float16") for optimizer in ("adamw", "muon")]
    runs = [("adamw", 2), ("muon", 1), ("adamw", 1), ("muon", 2)]
    if few:
        cases, runs = [("inf", "gradient", "muon", 1), ("nan", "loss", "adamw", 2), cases[-2]], runs[:2]
    for case in cases:
        skipped(*case)
    for case in runs:
        five_in_a_row(*case)
    bad_weights()
    return [Row("nan or inf in one rank's loss or gradient; 1 and 2 ranks, AdamW and Muon, float16 too",
                len(cases),
                "no weight and no moment changed on any rank, the step is logged as skipped, training went on"),
            Row("nan in every step from the fourth on", len(runs), "stopped with code 1 after five, naming step 8, the "
                "loss and 1,024 tokens; the checkpoint before them stays, with --keep_checkpoints 1 too"),
            Row("an update that puts inf into a weight when a checkpoint is due", 1, "the checkpoint is refused, those "
                "before it stay; stopped after five bad steps")]

