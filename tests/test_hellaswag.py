"""hellaswag.py against plain rows through transformers, against lm-eval, and against every way a file can be wrong.

    pytest tests/test_hellaswag.py
"""
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ENCODING,
    OURS,
    ROOT,
    command,
    error_of,
    flags,
    lm_eval_samples,
    needs,
    posix,
    random_gpt2,
    read_log,
    run,
    slow,
    vocabulary,
    wilson_ends,
)
from hub import COMMIT, hub, use_here
from hypothesis import given, settings
from hypothesis import strategies as st

import hellaswag
import train_gpt2
from hellaswag import cut_rows, evaluate, iterate_examples, render_example
from plumbing import accuracy, network, published
from plumbing.cli import Stopped, UserError
from plumbing.ranks import World
from plumbing.tokenizer import gpt2_encoding
from train_gpt2 import GPT, GPTConfig

pytestmark = needs(*ENCODING, "transformers")

SIZE = OURS.stat().st_size
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A GPT-2 with random weights, large enough that endings differ, in transformers' layout, and their model of it."""
    folder = tmp_path_factory.mktemp("gpt2")
    theirs = random_gpt2(folder, std=0.1, n_layer=2, n_head=2, n_embd=16, n_positions=256)
    return folder, theirs


def plain_losses(theirs, example) -> tuple[list[float], list[float]]:
    """(summed, mean) losses of the four endings, each a row of its own, from transformers' model."""
    encoding, sums, means = gpt2_encoding(), [], []
    context = encoding.encode_ordinary(example["ctx"])
    for ending in example["endings"]:
        ending = encoding.encode_ordinary(" " + ending)
        with torch.no_grad():
            h = theirs.transformer(torch.tensor([context + ending])).last_hidden_state[0, len(context) - 1:-1]
            losses = F.cross_entropy(theirs.lm_head(h), torch.tensor(ending), reduction="none")
        sums.append(losses.sum().item())
        means.append(losses.mean().item())
    return sums, means


@pytest.mark.parametrize("right, n, said", [
    (8, 30, "26.67% (95% interval 14.18 to 44.45%)"), (0, 30, "0.00% (95% interval 0.00 to 11.35%)"),
    (30, 30, "100.00% (95% interval 88.65 to 100.00%)"), (0, 1, "0.00% (95% interval 0.00 to 79.35%)"),
    (1, 1, "100.00% (95% interval 20.65 to 100.00%)"), (489, 2000, "24.45% (95% interval 22.62 to 26.38%)"),
    (2967, 10_042, "29.55% (95% interval 28.66 to 30.45%)"),
])
def test_an_accuracy_is_said_with_wilson_s_interval(right, n, said):
    p = right / n
    assert accuracy.describe(p, n) == said
    low, high = accuracy.interval(p, n)
    assert (low, high) == pytest.approx(wilson_ends(right, n), abs=1e-9) and 0 <= low <= p <= high <= 1 and low < high
    assert accuracy.standard_error(p, n) > 0
    if n >= 1000:  # where the usual formula holds, the two are the same
        assert accuracy.standard_error(p, n) == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), rel=2e-3)


@pytest.mark.parametrize("n", [1, 2, 7, 30, 1000, 10_042])
def test_the_interval_is_scipy_s(n):
    stats = pytest.importorskip("scipy.stats")
    for right in {0, 1, n // 4, n // 2, n - 1, n}:
        theirs = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
        assert accuracy.interval(right / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-7)
    assert all(map(math.isnan, accuracy.interval(math.nan, n)))


def check_against_plain_rows(path, folder, theirs, batch_tokens):
    examples = list(iterate_examples(path=path))
    result = evaluate(GPT.load(folder), examples, batch_tokens=batch_tokens)
    sums, means = map(np.array, zip(*(plain_losses(theirs, example) for example in examples)))
    np.testing.assert_allclose(result["losses"], means, atol=1e-4, rtol=0)
    assert np.ptp(means, axis=1).min() > 1e-3  # a model that sees no difference would agree with anything
    labels = np.array([example["label"] for example in examples])
    assert result["predictions"] == means.argmin(axis=1).tolist()
    assert result["acc_predictions"] == sums.argmin(axis=1).tolist()
    assert (result["acc"], result["acc_norm"]) == ((sums.argmin(axis=1) == labels).mean(),
                                                   (means.argmin(axis=1) == labels).mean())
    for name, chosen in (("acc", sums), ("acc_norm", means)):
        low, high = wilson_ends((chosen.argmin(axis=1) == labels).sum(), len(examples))
        assert result[f"{name}_interval"] == pytest.approx((low, high))
        assert result[f"{name}_stderr"] == pytest.approx((high - low) / 2 / 1.959964)
        if len(examples) >= 1000:  # lm-eval's, of a mean; of a few examples, all wrong, it would be 0
            error = np.std(chosen.argmin(axis=1) == labels, ddof=1) / math.sqrt(len(examples))
            assert result[f"{name}_stderr"] == pytest.approx(error, rel=2 / len(examples))
    assert (result["n"], result["cut"]) == (len(examples), 0)


@pytest.mark.parametrize("batch_tokens", [0, 1, 150])
def test_every_loss_is_that_of_four_plain_rows(batch_tokens, gpt2_folder):
    check_against_plain_rows(OURS, *gpt2_folder, batch_tokens)


@pytest.mark.skipif("HELLASWAG_DATA" not in os.environ, reason="HELLASWAG_DATA names no file of real examples")
def test_every_loss_of_the_real_examples_is_that_of_four_plain_rows(gpt2_folder):
    check_against_plain_rows(os.environ["HELLASWAG_DATA"], *gpt2_folder, 0)


def test_the_context_is_read_once(gpt2_folder):
    """Tokens that go through the model and rows of logits, counted: those of the arithmetic, and a little padding."""
    model, examples, read, predicted = GPT.load(gpt2_folder[0]), list(iterate_examples(path=OURS)), [], []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    model.lm_head.register_forward_hook(lambda module, inputs, output: predicted.append(len(inputs[0])))
    evaluate(model, examples, batch_tokens=64)
    encode = gpt2_encoding().encode_ordinary
    contexts = [len(encode(example["ctx"])) for example in examples]
    endings = [sum(len(encode(" " + ending)) for ending in example["endings"]) for example in examples]
    assert sum(predicted) == sum(endings)
    plain = sum(4 * context + ending for context, ending in zip(contexts, endings))
    shared = sum(contexts) + sum(endings) - 4 * len(examples)  # what is predicted last is not read
    assert shared <= sum(read) < 0.7 * plain
    assert sum(read) < 1.2 * shared


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_who_looks_at_the_length_or_the_place_of_an_ending_alone_guesses(style):
    """On our examples the right ending is as often the shortest, the longest and the first as any other."""
    right = {}
    for example in iterate_examples(path=OURS):
        _, endings, characters = hellaswag.encode_example(example, style)
        lengths = {"tokens": list(map(len, endings)), "characters": characters if style == "harness" else
                   list(map(len, example["endings"])), "places": [0, 1, 2, 3]}
        for name, found in lengths.items():
            chosen = found[example["label"]]
            for rank, length in enumerate(sorted(found)):  # endings of the same length share the hit
                right[name, rank] = right.get((name, rank), 0) + (chosen == length) / found.count(length)
    assert len(right) == 12 and sum(right.values()) == pytest.approx(3 * 30)
    assert all(5.5 <= count <= 9.5 for count in right.values()), right


def test_a_model_for_which_all_tokens_are_alike_guesses():
    """Each token costs it ln V: the sum is lowest for the shortest ending; the mean is the same for all four."""
    model, examples = GPT(GPTConfig(block_size=256, n_layer=1, n_head=1, n_embd=8)), list(iterate_examples(path=OURS))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = evaluate(model, examples)
    np.testing.assert_allclose(result["losses"], math.log(model.config.vocab_size), rtol=1e-5)
    assert result["acc_predictions"] == [int(np.argmin(tokens)) for tokens in result["tokens"]]
    assert 5 / 30 <= result["acc"] <= 10 / 30


def test_render_example():
    example = next(iterate_examples(path=OURS))
    tokens, mask, label = render_example(example)
    assert tokens.shape == mask.shape and tokens.size(0) == 4 and label == example["label"]
    for row, on, ending in zip(tokens, mask.bool(), example["endings"]):
        length = int(on.nonzero().max()) + 1
        assert gpt2_encoding().decode(row[:length].tolist()) == f"{example['ctx']} {ending}"
        assert gpt2_encoding().decode(row[on].tolist()) == " " + ending
        assert not row[length:].any()


# ----------------------------------------------------------------------------------------------- longer than the block

@settings(max_examples=200)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=30),
       st.integers(1, 20))
def test_contexts_lose_tokens_on_the_left_and_endings_never(context, ending, block_size):
    rows = list(cut_rows(context, ending, block_size))
    assert [token for tokens, scored in rows for token in tokens[-scored:]] == ending
    assert all(len(tokens) <= block_size + 1 and 1 <= scored < len(tokens) for tokens, scored in rows)
    if len(ending) <= block_size:  # as lm-eval cuts
        assert rows == [((context + ending)[-(block_size + 1):], len(ending))]
    stop = len(context)
    for tokens, scored in rows:
        stop += scored
        assert tokens == (context + ending)[max(0, stop - block_size - 1):stop]


@pytest.mark.parametrize("block_size", [24, 64, 100])
def test_cut_examples_have_the_losses_of_their_windows(block_size, tmp_path):
    """Against transformers, a window at a time, by the definition: what fits before the last token to be predicted."""
    theirs = random_gpt2(tmp_path, std=0.1, n_layer=2, n_head=2, n_embd=16, n_positions=block_size)
    examples = list(iterate_examples(path=OURS))
    result = evaluate(GPT.load(tmp_path), examples)
    encode, cut, long = gpt2_encoding().encode_ordinary, 0, 0
    for example, losses in zip(examples, result["losses"]):
        context, endings = encode(example["ctx"]), [encode(" " + ending) for ending in example["endings"]]
        cut += any(len(context + ending) > block_size + 1 for ending in endings)
        for ending, loss in zip(endings, losses):
            tokens, total = context + ending, 0.0
            long += len(ending) > block_size
            for start in range(0, len(ending), block_size):
                stop = min(len(tokens), len(context) + start + block_size)
                window, predicted = tokens[max(0, stop - block_size - 1):stop], stop - len(context) - start
                with torch.no_grad():
                    logits = theirs(torch.tensor([window[:-1]])).logits[0, -predicted:]
                total += F.cross_entropy(logits, torch.tensor(window[-predicted:]), reduction="sum").item()
            assert loss == pytest.approx(total / len(ending), abs=1e-4)
    assert result["cut"] == cut > 0 and (long > 0) == (block_size < 64)


# --------------------------------------------------------------------------------------------------------- the harness

def save_tokenizer(folder: Path) -> None:
    """GPT-2's tokenizer in transformers' layout, from OpenAI's own vocabulary files."""
    from transformers import GPT2Tokenizer

    GPT2Tokenizer(str(vocabulary() / "encoder.json"), str(vocabulary() / "vocab.bpe")).save_pretrained(folder)


@pytest.mark.slow
@needs("lm_eval")
def test_the_harness_style_is_lm_eval_s_prediction_by_prediction(gpt2_folder, tmp_path):
    folder, _ = gpt2_folder
    save_tokenizer(folder)
    samples, results = lm_eval_samples(folder, OURS, tmp_path)
    result = run(["--model", folder, "--data", OURS, "--style", "harness", "--out", tmp_path / "ours.jsonl",
                  "--dtype", "float32"], script=ROOT / "hellaswag.py")
    assert result.returncode == 0, result.stderr
    ours = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
    assert len(ours) == len(samples) == 30
    for mine, theirs in zip(ours, samples):
        sums = np.multiply(mine["losses"], mine["tokens"])
        np.testing.assert_allclose(sums, theirs["losses"], atol=2e-3, rtol=0)  # sums of up to a hundred losses
        lengths = [len(choice) for choice in theirs["choices"]]
        assert mine["acc_prediction"] == np.argmin(theirs["losses"])
        assert mine["acc_norm_prediction"] == np.argmin(np.divide(theirs["losses"], lengths))
        assert theirs["acc"] == (mine["acc_prediction"] == mine["label"])
        assert theirs["acc_norm"] == (mine["acc_norm_prediction"] == mine["label"])
    assert f"acc | {results['acc,none']:.2%}" in result.stdout
    assert f"acc_norm | {results['acc_norm,none']:.2%}" in result.stdout


# ------------------------------------------------------------------------------------------------------- the command

def score(*arguments) -> str:
    """What the command prints on stdout with these arguments, in this process."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            hellaswag.main(list(map(str, arguments)))
    finally:
        signal.signal(signal.SIGTERM, before)
    return said.getvalue()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_result(ranks, gpt2_folder, tmp_path):
    """What --out holds of the real command on several ranks, and of one in this process."""
    arguments = ["--model", gpt2_folder[0], "--data", OURS, "--batch_tokens", 32, "--dtype", "float32", "--out"]
    result = run([*arguments, tmp_path / "many.jsonl"], ranks, script=ROOT / "hellaswag.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("acc_norm |") == 1  # rank 0 alone speaks
    score(*arguments, tmp_path / "one.jsonl")
    one, many = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                 for name in ("one", "many"))
    assert len(one) == 30 and [row["losses"] for row in one] != [[0.0] * 4] * 30
    assert one == many


def test_every_rank_scores_its_part_and_no_other(monkeypatch):
    """What each of three ranks adds to the sum that they all get: every ending is in exactly one part."""
    parts = []

    def keep(gathered, *_, **__):
        parts.append(gathered.clone())

    monkeypatch.setattr(hellaswag.dist, "all_reduce", keep)
    torch.manual_seed(0)
    model, examples = GPT(GPTConfig(block_size=256, n_layer=1, n_head=1, n_embd=8)), list(iterate_examples(path=OURS))
    for rank in range(3):
        evaluate(model, examples, World(rank, 3), batch_tokens=16)
    monkeypatch.undo()
    whole = evaluate(model, examples, batch_tokens=16)
    parts = [part[:-1] for part in parts]  # the last row tells whether to stop
    assert ((torch.stack(parts) != 0).sum(dim=0) == 1).all()
    assert (sum(parts).numpy() / whole["tokens"]).tolist() == whole["losses"]


def test_only_rank_0_reads_and_its_error_is_everybody_s(monkeypatch):
    sent = []
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda outcome, *_, **__: sent.append(list(outcome)))
    assert len(hellaswag.load_examples(path=OURS, world=World(0, 2))) == 30 and len(sent[0][0]) == 30
    with pytest.raises(UserError, match="cannot be read"):
        hellaswag.load_examples(path="nowhere.jsonl", world=World(0, 2))
    for result, message in sent:  # the other rank has no file at all

        def receive(outcome, src, *_, content=(result, message), **__):
            outcome[:] = content

        monkeypatch.setattr("torch.distributed.broadcast_object_list", receive)
        monkeypatch.delattr(hellaswag, "iterate_examples", raising=False)
        if message:
            with pytest.raises(UserError, match="cannot be read"):
                hellaswag.load_examples(path="nowhere.jsonl", world=World(1, 2))
        else:
            assert hellaswag.load_examples(path="nowhere.jsonl", world=World(1, 2)) == result
    assert [bool(message) for _, message in sent] == [False, True]


def test_the_batches_are_shared_out_evenly():
    examples = list(iterate_examples(path=OURS))
    work = [hellaswag.make_work(i, *hellaswag.encode_example(example, "completion")[:2], 1024)
            for i, example in enumerate(examples)]
    batches = hellaswag.make_batches(work, 16)
    for world_size in (1, 2, 3, 40):
        assigned = hellaswag.assign_batches(batches, world_size)
        found = [item.rows[0].example for mine in assigned for batch in mine for item in batch]
        assert sorted(found) == list(range(30)) and len(assigned) == world_size
        costs = [sum(item.cost for batch in mine for item in batch) for mine in assigned]
        if world_size < 4:
            assert max(costs) < 1.15 * sum(costs) / world_size


def test_limit_and_gzip_and_the_published_number(gpt2_folder, tmp_path, monkeypatch):
    with gzip.open(tmp_path / "examples.jsonl.gz", "wb") as file:
        file.write(OURS.read_bytes())
    known = hashlib.sha256((gpt2_folder[0] / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(published.MODELS, "gpt2", (COMMIT, known))
    with hub({"models/openai-community/gpt2": gpt2_folder[0]}, tmp_path / "cache") as (environment, _):
        use_here(environment, monkeypatch)
        said = score("--model", "gpt2", "--data", tmp_path / "examples.jsonl.gz", "--limit", 7)
    assert "7 examples in" in said and "published for all 10,042: 29.55%" in said


def test_an_error_ends_the_command_with_code_2_and_one_line(gpt2_folder):
    result = run(["--model", gpt2_folder[0], "--data", "nowhere.jsonl"], script=ROOT / "hellaswag.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: nowhere.jsonl cannot be read")


GOOD = json.loads(OURS.read_text(encoding="utf-8").splitlines()[0])


@pytest.mark.parametrize("line, message", [
    ({**GOOD, "endings": GOOD["endings"][:3]}, "its 'endings' are not a list of four texts"),
    ({**GOOD, "endings": [*GOOD["endings"][:3], " "]}, "its ending 3 is empty"),
    ({**GOOD, "endings": [1, 2, 3, 4]}, "ending 0 is empty"),
    ({key: value for key, value in GOOD.items() if key != "label"}, "its 'label' is None"),
    ({**GOOD, "label": 4}, "its 'label' is 4, not the number of an ending"),
    ({**GOOD, "label": True}, "'label' is True"),
    ({**GOOD, "ctx": " "}, "its context is empty"), ({**GOOD, "ctx": None}, "it has no text 'ctx'"),
    ([GOOD], "this is not a JSON object"), ("{", "is not JSON in UTF-8"), (b"\xff", "is not JSON in UTF-8"),
    ("[" * 100_000, "is not JSON in UTF-8"), ({**GOOD, "ctx": " " * 10**6 + "a"}, "more than 200,000 characters"),
])
def test_a_row_that_cannot_be_scored_is_named_by_its_line(line, message, tmp_path):
    good = json.dumps(GOOD).encode() + b"\n"
    line = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    (tmp_path / "bad.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(UserError, match=r"bad\.jsonl, line 3") as error:
        list(iterate_examples(path=tmp_path / "bad.jsonl"))
    assert message in str(error.value)


def test_the_command_scores_nothing_where_a_row_is_bad(gpt2_folder, tmp_path):
    bad = {**GOOD, "endings": ["one"]}
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (GOOD, GOOD, bad)))
    arguments = ["--data", tmp_path / "bad.jsonl", "--out", tmp_path / "out.jsonl"]
    message = error_of(score, "--model", gpt2_folder[0], *arguments)
    assert "bad.jsonl, line 3: its 'endings' are not a list of four texts" in message
    assert not list(tmp_path.glob("out*"))


def test_the_harness_style_needs_the_official_columns(gpt2_folder, tmp_path):
    rows = [GOOD, {key: GOOD[key] for key in ("activity_label", "ctx", "endings", "label")}]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(list(iterate_examples(path=tmp_path / "short.jsonl"))) == 2
    message = error_of(score, "--model", gpt2_folder[0], "--style", "harness", "--data", tmp_path / "short.jsonl")
    assert "short.jsonl, line 2: it has no text 'ctx_a', which --style harness needs" in message
    for marks, message in (({"endings": ["[title]", "a", "b", "c"]}, "line 1: its ending 0 is empty"),
                           ({"activity_label": "[", "ctx_a": "x]", "ctx_b": ""}, "line 1: its context is empty")):
        (tmp_path / "marks.jsonl").write_text(json.dumps({**GOOD, **marks}))
        with pytest.raises(UserError, match=message):
            list(iterate_examples(path=tmp_path / "marks.jsonl", style="harness"))


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"), (["--style", "best"], "it must be completion or"),
    (["--split", "test"], "it must be val or train"), (["--limit", "-1"], "--limit is -1, it must be a number from 0"),
    (["--data", OURS, "--model", "gpt5"], "no model 'gpt5'"), (["--device", "abacus"], "no device 'abacus'"),
    (["--out", "/proc/nowhere/x"], "cannot make the folder /proc/nowhere"), (["--models", "x"], "unrecognized"),
    (["--data", OURS, "--out", OURS], "already exists: choose another --out"),
    (["--out", "."], ". already exists"), (["--out", "/dev/null"], "/dev/null already exists"),
])
def test_wrong_flags_and_files(arguments, message, gpt2_folder):
    before = OURS.read_bytes()
    assert message in error_of(score, "--model", gpt2_folder[0], *arguments)
    assert OURS.read_bytes() == before


def test_weights_that_are_not_finite_are_no_result(tmp_path, capsys):
    theirs = random_gpt2(tmp_path, n_layer=1, n_head=1, n_embd=8, n_positions=64)
    with torch.no_grad():
        theirs.transformer.wpe.weight.fill_(math.nan)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(FloatingPointError, match="losses that are not finite"):
        score("--model", tmp_path, "--data", OURS, "--out", tmp_path / "out")
    assert "acc" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_signal_leaves_it_after_the_pass_that_is_under_way(gpt2_folder):
    model, world, passes = GPT.load(gpt2_folder[0]), World(), []
    model.lm_head.register_forward_hook(lambda *_: (passes.append(world.stop.set()), None)[1])
    with pytest.raises(Stopped):
        evaluate(model, list(iterate_examples(path=OURS)), world, batch_tokens=1)
    assert len(passes) == 1


@posix
@pytest.mark.parametrize("sign", [signal.SIGINT, slow(signal.SIGTERM)])
def test_a_stopped_command_leaves_nothing(sign, gpt2_folder, tmp_path):
    (tmp_path / "many.jsonl").write_bytes(OURS.read_bytes() * 500)
    arguments = ["--model", gpt2_folder[0], "--data", tmp_path / "many.jsonl", "--out", tmp_path / "out" / "o.jsonl"]
    process = subprocess.Popen(command(arguments, script=ROOT / "hellaswag.py"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert "on 15,000 examples" in process.stdout.readline()  # which take minutes
    process.send_signal(sign)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and errors.splitlines()[-1] == "error: interrupted"
    assert list((tmp_path / "out").iterdir()) == []


def test_memory_that_runs_out_is_said(monkeypatch):
    def full(*arguments, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hellaswag, "sum_losses", full)
    with pytest.raises(UserError, match=r"--hellaswag_every 0, .* less than --batch_tokens 1024"):
        evaluate(GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)), [GOOD])


def test_files_that_are_damaged_or_empty(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(OURS.read_bytes())[:-900])
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for name, message in (("cut.jsonl.gz", "cannot be read"), ("empty.jsonl", "there are no examples")):
        with pytest.raises(UserError, match=message):
            hellaswag.load_examples(path=tmp_path / name)


def test_models_that_cannot_answer():
    model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(math.nan)
    assert math.isnan(evaluate(model, [GOOD])["acc"])
    with pytest.raises(UserError, match="too few for GPT-2's encoding"):
        evaluate(GPT(GPTConfig(block_size=64, vocab_size=211, n_layer=1, n_head=1, n_embd=8)), [GOOD])
    with pytest.raises(UserError, match="example 2: its 'label' is 9"):
        evaluate(model, [GOOD, {**GOOD, "label": 9}])
    with pytest.raises(UserError, match="no style 'harnes'"):
        evaluate(model, [GOOD], style="harnes")


# ------------------------------------------------------------------------------------------------------- the download

LOCK = ".hellaswag_val.jsonl.lock"  # stays beside the file, empty


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site on loopback that has the official file, here our own; downloads go to a folder of the test's."""
    text = OURS.read_bytes()
    monkeypatch.setattr(hellaswag, "FILES", {"val": (len(text), hashlib.sha256(text).hexdigest())})
    monkeypatch.setattr(hellaswag, "FOLDER", str(tmp_path / "downloads"))
    monkeypatch.setattr(network, "wait", lambda seconds, *_, **__: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with hub({}, tmp_path / "cache") as (environment, handler):
        handler.files = {"/data/hellaswag_val.jsonl": text}
        monkeypatch.setattr(hellaswag, "URL", environment["HF_ENDPOINT"] + "/data/")
        yield handler, tmp_path / "downloads"


def test_the_official_file_is_downloaded_once(site):
    handler, folder = site
    assert len(hellaswag.load_examples()) == 30
    assert len(list(iterate_examples("val"))) == 30
    assert len(handler.seen) == 1 and {path.name for path in folder.iterdir()} == {"hellaswag_val.jsonl", LOCK}
    (folder / "hellaswag_val.jsonl").write_text("something else")
    assert len(hellaswag.load_examples()) == 30 and len(handler.seen) == 2


@pytest.mark.parametrize("trouble, message, requests", [
    (404, "404 Client Error", 1), (500, "500 Server Error", 4), (429, "429 Client Error", 4), ("cut", "", 4),
    ("html", f"39 bytes of text/html, not the {SIZE:,} with the SHA-256 ", 4),
    ("longer", f"{SIZE + 1:,} bytes of application/octet-stream, not the {SIZE:,} with the SHA-256 ", 4),
    ("other", f"{SIZE:,} bytes of application/octet-stream, not the {SIZE:,} with the SHA-256 ", 4),
    ("mute", "timed out", 4),
])
def test_what_is_not_the_official_file_is_said_and_not_kept(trouble, message, requests, site, monkeypatch):
    handler, folder = site
    if trouble == "mute":
        monkeypatch.setattr(network, "TIMEOUT", (30, 0.1))
    if trouble in ("longer", "other"):
        text = handler.files["/data/hellaswag_val.jsonl"]
        handler.files = {"/data/hellaswag_val.jsonl": text + b"\n" if trouble == "longer" else text[:-2] + b"?\n"}
    else:
        handler.trouble = staticmethod(lambda path: trouble)
    with pytest.raises(UserError, match=r"cannot download hellaswag_val\.jsonl") as error:
        hellaswag.load_examples()
    assert message in str(error.value) and "yourself" in str(error.value)
    assert len(handler.seen) == requests and [path.name for path in folder.iterdir()] == [LOCK]


def test_an_answer_that_is_too_long_is_not_read_to_its_end(site):
    handler, _ = site
    handler.files = {path: text + b"\n" * 1_000_000 for path, text in handler.files.items()}
    with pytest.raises(UserError, match=r"received [\d,]+ bytes") as error:
        hellaswag.load_examples()
    received = int(re.search(r"received ([\d,]+)", str(error.value))[1].replace(",", ""))
    assert SIZE < received <= SIZE + 2**16


def test_a_download_that_fails_twice_succeeds(site):
    handler, _ = site
    handler.trouble = staticmethod(lambda path: {1: 503, 2: "cut"}.get(len(handler.seen)))
    assert len(hellaswag.load_examples()) == 30 and len(handler.seen) == 3


@pytest.mark.parametrize("first_fails", [False, True])
def test_two_downloads_at_once_both_end_with_the_file(first_fails, site, monkeypatch, capsys):
    """The second waits for the first: it finds the file, or downloads it itself if the first one gives up."""
    handler, folder = site
    asked, answer = threading.Event(), threading.Event()

    def hold(path):
        asked.set()
        assert answer.wait(30)
        return 404 if first_fails and len(handler.seen) == 1 else None

    handler.trouble = staticmethod(hold)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(hellaswag.load_examples)
        assert asked.wait(30)
        second, errors = pool.submit(hellaswag.load_examples), ""
        while "another process is downloading into" not in errors and not second.done():
            errors += capsys.readouterr().err
            time.sleep(0.01)
        answer.set()
        assert len(second.result(30)) == 30
        if first_fails:
            with pytest.raises(UserError, match="404 Client Error"):
                first.result(30)
        else:
            assert first.result(30) == second.result()
    assert len(handler.seen) == 1 + first_fails
    assert {path.name for path in folder.iterdir()} == {"hellaswag_val.jsonl", LOCK}


def test_a_download_that_never_ends_elsewhere_is_said_with_the_remedy(site, monkeypatch):
    handler, folder = site
    monkeypatch.setattr(network, "LOCK_SECONDS", 0.2)
    folder.mkdir()
    with filelock.FileLock(folder / LOCK):
        with pytest.raises(UserError, match=r"another process is downloading into .*: wait .*, or put the file from"):
            hellaswag.load_examples()
    assert handler.seen == []
    assert len(hellaswag.load_examples()) == 30


def test_a_killed_download_is_done_again(site, tmp_path):
    """SIGKILL in the middle: nothing has the file's name, and the next one takes the lock and ends with the file."""
    handler, folder = site
    body, asked, answer = handler.files["/data/hellaswag_val.jsonl"], threading.Event(), threading.Event()

    def hold(path):
        asked.set()
        answer.wait(30)

    handler.trouble = staticmethod(hold)
    size, digest = hellaswag.FILES["val"]
    script = tmp_path / "download.py"
    script.write_text("from pathlib import Path\nfrom plumbing import network\n"
                      f"network.download({hellaswag.URL + 'hellaswag_val.jsonl'!r}, "
                      f"Path({str(folder / 'hellaswag_val.jsonl')!r}), {size}, {digest!r})\n")
    process = subprocess.Popen(command([], script=script), env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert asked.wait(60)
    process.kill()
    process.wait()
    (folder / "hellaswag_val.jsonl.tmp").write_bytes(body[:999])  # what it leaves if it is killed while it writes
    answer.set()
    assert not (folder / "hellaswag_val.jsonl").exists()
    assert len(hellaswag.load_examples()) == 30
    assert {path.name for path in folder.iterdir()} == {"hellaswag_val.jsonl", LOCK}


def test_no_network_and_no_room_are_said(site, monkeypatch, tmp_path):
    url = hellaswag.URL
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match=r"cannot download hellaswag_val.jsonl: .* refused; check the network"):
        hellaswag.load_examples()
    temporary = tmp_path / "downloads" / "hellaswag_val.jsonl.tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(hellaswag, "URL", url)
        with pytest.raises(UserError, match=r"cannot write .*\.tmp is a folder"):
            hellaswag.load_examples()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(hellaswag, "FOLDER", str(tmp_path / "file" / "downloads"))
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        hellaswag.load_examples()


# ---------------------------------------------------------------------------------------------------- in the training

EVERY = {"hellaswag_every": 2, "hellaswag_data": OURS, "sequence_length": 64, "total_batch_size": 512, "max_steps": 5}


def train(**changes) -> None:
    """Run train_gpt2.py in this process."""
    train_gpt2.main(train_gpt2.parse_args(flags(**changes)))


def test_training_logs_it_and_a_resumed_run_too(shard_folder, tmp_path, capsys):
    out = tmp_path / "out"
    train(data=shard_folder, out_dir=out, **EVERY, hellaswag_limit=12)
    lines = read_log(out, "hellaswag")
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(set(line) == {"kind", "step", "acc", "acc_norm", "n"} and line["n"] == 12 for line in lines)
    # the last is what the command says of the last checkpoint
    alone = score("--model", out, "--data", OURS, "--limit", 12, "--dtype", "float32")
    assert f"acc | {lines[-1]['acc']:.2%}" in alone and f"acc_norm | {lines[-1]['acc_norm']:.2%}" in alone
    (out / "model_000005.pt").unlink()
    train(data=shard_folder, out_dir=out, **EVERY | {"hellaswag_every": 4}, hellaswag_limit=12)
    assert "resumed after step 4" in capsys.readouterr().out and read_log(out, "hellaswag") == lines
    assert f"did you mean {out}?" in error_of(score, "--model", tmp_path, "--data", OURS)


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_log_the_same(shard_folder, tmp_path):
    for ranks in (1, 2):
        result = run(flags(data=shard_folder, out_dir=tmp_path / f"{ranks}", **EVERY), ranks)
        assert result.returncode == 0, result.stderr
    assert read_log(tmp_path / "1", "hellaswag") == read_log(tmp_path / "2", "hellaswag")
    assert len(read_log(tmp_path / "2", "hellaswag")) == 3


@pytest.mark.slow
def test_a_compiled_run_logs_the_same(shard_folder, tmp_path):
    for compiled in (False, True):
        result = run(flags(data=shard_folder, out_dir=tmp_path / str(compiled), **EVERY, compile=compiled))
        assert result.returncode == 0, result.stderr
    assert read_log(tmp_path / "True", "hellaswag") == read_log(tmp_path / "False", "hellaswag")


def test_its_time_is_not_in_the_step_time(shard_folder, tmp_path, monkeypatch):
    original, clock, late = hellaswag.evaluate, time.perf_counter, []

    def take_a_day(*values, **options):
        late.append(86_400)
        return original(*values, **options)

    monkeypatch.setattr(hellaswag, "evaluate", take_a_day)
    monkeypatch.setattr(time, "perf_counter", lambda *_, **__: clock() + sum(late))
    train(data=shard_folder, out_dir=tmp_path, **EVERY | {"max_steps": 3}, hellaswag_limit=1)
    assert len(late) == 2 and max(line["dt_ms"] for line in read_log(tmp_path, "train")) < 86_400_000


def test_without_file_and_network_training_says_so_once_and_goes_on(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network, "wait", lambda seconds, *_, **__: None)
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/")
    train(data=shard_folder, out_dir=tmp_path / "out", **EVERY | {"hellaswag_data": None, "hellaswag_every": 1,
                                                                  "max_steps": 2})
    assert capsys.readouterr().out.count("warning: no HellaSwag: cannot download hellaswag_val.jsonl") == 1
    assert read_log(tmp_path / "out", "hellaswag") == [] and len(read_log(tmp_path / "out", "train")) == 2


def test_a_named_file_that_is_not_there_ends_the_run_before_it_begins(shard_folder, tmp_path):
    arguments = flags(data=shard_folder, out_dir=tmp_path / "out", **EVERY | {"hellaswag_data": "nowhere.jsonl"})
    message = error_of(lambda: train_gpt2.main(train_gpt2.parse_args(arguments)))
    assert message.startswith("error: nowhere.jsonl cannot be read") and not (tmp_path / "out").exists()


def test_it_is_scored_in_the_precision_of_training(shard_folder, tmp_path, monkeypatch):
    seen, original = [], hellaswag.sum_losses

    def watched(*values, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(*values, **options)

    monkeypatch.setattr(hellaswag, "sum_losses", watched)
    for dtype in ("float32", "bfloat16"):
        train(data=shard_folder, out_dir=tmp_path / dtype, **EVERY | {"max_steps": 2}, dtype=dtype, hellaswag_limit=2)
    half = len(seen) // 2
    assert half >= 1 and seen == [False] * half + [True] * half


def test_missing_packages_are_named_with_their_remedy(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "requests", None)
    train(data=shard_folder, out_dir=tmp_path / "out", **EVERY | {"hellaswag_data": None, "max_steps": 2})
    said = capsys.readouterr()
    assert "trying again" not in said.err
    assert "no HellaSwag: import of requests halted; None in sys.modules: run pip install" in said.out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it needs Linux's /dev/full")
def test_a_result_that_cannot_be_printed_is_an_error(tmp_path):
    random_gpt2(tmp_path, n_layer=1, n_head=2, n_embd=16, n_positions=64)
    arguments = ["--model", tmp_path, "--data", OURS, "--limit", "2", "--device", "cpu"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command(arguments, script=ROOT / "hellaswag.py"), stdout=full, stderr=subprocess.PIPE,
                                text=True)
    assert result.returncode == 2 and result.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
