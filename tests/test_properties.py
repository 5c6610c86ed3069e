"""What must hold for any data, settings and sizes: random ones, the same every time, against plain loops and formulas.

    pytest tests/test_properties.py
"""
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import re
import shlex
import string
from fractions import Fraction
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import ENCODING, ROOT, make_loader, needs, plain_tokens, prepare, set_piece_bytes, write_jsonl
from helpers import shards as read_shards
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import storage_directory

import fineweb
import hellaswag
import train_gpt2
from plumbing import cli, manifest, run_folder, runlog
from plumbing.batching import assign_batches, make_batches, make_passes
from plumbing.cli import UserError
from plumbing.files import DataError
from plumbing.ranks import World
from plumbing.tokenizer import EOT
from train_gpt2 import GPT, GPTConfig, TrainConfig, get_lr


@pytest.fixture
def alone(monkeypatch):
    """Each of several ranks gets only its own part of a sum, as the others are computed after it."""
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)


@pytest.fixture
def read_once(monkeypatch):
    """The source of a dataclass, from which its flags are made, is parsed once."""
    monkeypatch.setattr(cli, "inspect", SimpleNamespace(getsource=functools.cache(inspect.getsource)))


# ---------------------------------------------------------------------------------------------------------------------
# The examples
# ---------------------------------------------------------------------------------------------------------------------

def test_the_examples_are_the_same_at_every_run_and_leave_no_files():
    now = settings()
    assert now.derandomize and now.deadline is None and now.database is None
    assert not storage_directory("examples", intent_to_write=False).path.resolve().is_relative_to(ROOT)


def test_the_examples_depend_on_no_module_that_is_imported_later(tmp_path, monkeypatch):
    """Hypothesis tries the constants in the modules that it finds, of which another test may import more."""
    def examples() -> list[int]:
        found = []
        settings(max_examples=200)(given(st.integers())(lambda number: found.append(number)))()
        return found

    before = examples()
    (tmp_path / "constants.py").write_text(f"NUMBERS = {[987_654_321 + i for i in range(99)]}")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("constants")
    assert examples() == before and len(set(before)) > 100


# ---------------------------------------------------------------------------------------------------------------------
# The loader's order. Tokens are numbered, so that the first one tells a window.
# ---------------------------------------------------------------------------------------------------------------------

def write_numbered_shards(folder, split: str, lengths: dict[int, int], T: int) -> list[int]:
    """Write shards {number in its name: tokens} -> the first token of each window, found by a plain loop."""
    firsts = []
    for i, number in enumerate(sorted(lengths)):
        token = 100 * i  # there is a gap between two shards
        tokens = list(range(token, token + lengths[number]))
        np.save(folder / f"x_{split}_{number:06d}.npy", np.array(tokens, dtype=np.uint16))
        while len(tokens) > T:
            firsts.append(tokens[0])
            tokens = tokens[T:]
    return firsts


def take(loader, i: int) -> list[int]:
    """The first token of each window of micro-batch i, after a check that the others follow it."""
    x, y = loader.batch(i)
    assert x.shape == y.shape == (loader.B, loader.T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x, x[:, :1] + torch.arange(loader.T)) and torch.equal(y, x + 1)
    return x[:, 0].tolist()


NUMBERED = st.dictionaries(st.integers(0, 20), st.integers(0, 40), min_size=1, max_size=4)


@settings(max_examples=60)
@given(lengths=NUMBERED, B=st.integers(1, 5), T=st.integers(1, 9), world_size=st.integers(1, 4),
       options=st.fixed_dictionaries({"seed": st.integers(0, 2**32 - 1), "shuffle": st.booleans()}), data=st.data())
def test_an_epoch_has_every_window_once_at_any_batch_and_number_of_ranks(
        lengths, B, T, world_size, options, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    expected = write_numbered_shards(folder, "train", lengths, T)
    if not expected:
        with pytest.raises(DataError, match="shorter than one window"):
            make_loader(folder, "train", B, T)
        return
    n = len(expected)
    one = make_loader(folder, "train", 1, T, **options)
    order = [first for i in range(3 * n) for first in take(one, i)]
    for epoch in (order[:n], order[n:2 * n], order[2 * n:]):
        assert sorted(epoch) == expected and (options["shuffle"] or epoch == expected)
    ranks = [make_loader(folder, "train", B, T, rank, world_size, **options) for rank in range(world_size)]
    batches = [[take(loader, i) for loader in ranks] for i in range(3 * n // (B * world_size))]
    merged = [first for batch in batches for windows in batch for first in windows]
    assert merged == order[:len(merged)] and len(merged) > 3 * n - B * world_size
    for _ in range(4 * bool(batches)):  # any of them, in any order
        i, rank = data.draw(st.integers(0, len(batches) - 1)), data.draw(st.integers(0, world_size - 1))
        assert take(ranks[rank], i) == batches[i][rank]


@pytest.mark.usefixtures("alone")
@settings(max_examples=40)
@given(lengths=NUMBERED, B=st.integers(1, 5), T=st.integers(1, 9), world_size=st.integers(1, 4),
       val_tokens=st.integers(1, 200), shuffle=st.booleans())
def test_validation_counts_each_of_the_first_windows_once(
        lengths, B, T, world_size, val_tokens, shuffle, tmp_path_factory):
    """With a loss per token that tells the tokens apart."""
    folder = tmp_path_factory.mktemp("data")
    firsts = write_numbered_shards(folder, "val", lengths, T)
    assume(firsts)
    counted = []

    def model(x, y):
        for window, targets in zip(x, y):
            assert torch.equal(targets, window + 1) or (targets == -100).all()
        x = x[y[:, 0] >= 0]
        counted.extend(x[:, 0].tolist())
        return (x.double() ** 2).mean()

    loss = sum(train_gpt2.evaluate_val_loss(
        model, make_loader(folder, "val", B, T, rank, world_size, shuffle=shuffle), val_tokens, World(rank, world_size))
        for rank in range(world_size))
    wanted = firsts[:max(1, val_tokens // T)]
    assert sorted(counted) == wanted
    squares = [(first + t) ** 2 for first in wanted for t in range(T)]
    assert loss == pytest.approx(sum(squares) / len(squares), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The schedule
# ---------------------------------------------------------------------------------------------------------------------

@given(max_steps=st.integers(1, 60), warmup=st.integers(0, 60), decay=st.integers(0, 60), rates=st.tuples(
    st.floats(1e-6, 1), st.floats(0, 1)), shape=st.sampled_from(["cosine", "linear"]))
def test_the_learning_rate_rises_stays_and_falls_without_a_jump(max_steps, warmup, decay, rates, shape):
    """It is a trapezium from above 0 over max_lr to min_lr, whose right side may be half a wave."""
    high, low = rates[0], rates[0] * rates[1]
    warmup = min(warmup, max_steps)
    decay = min(decay, max_steps - warmup)
    config = TrainConfig(max_steps=max_steps, warmup_steps=warmup, decay_steps=decay, max_lr=high, min_lr=low,
                         decay=shape)
    found = [get_lr(step, config) for step in range(max_steps + 1)]
    length = decay or max_steps - warmup  # of the decay
    expected = []
    for step in range(max_steps + 1):
        rising = Fraction(step + 1, warmup) if warmup else 1
        falling = min(1, Fraction(max_steps - step, length)) if length else 1  # 0 after the last step
        share = math.sin(math.pi / 2 * falling) ** 2 if shape == "cosine" else float(falling)
        expected.append(high * float(rising) if step < warmup else low * (1 - share) + high * share)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)
    before, after = found[:warmup], found[warmup:]
    assert get_lr(max_steps + 1000, config) == low and (found[-1] == low or not length)
    assert high == pytest.approx((before or [high])[-1]) == pytest.approx(after[0])
    rises, falls = np.diff([0, *before]), -np.diff(after)
    steepest = (high - low) / max(1, length) * (math.pi / 2 if shape == "cosine" else 1)
    rounding = 1e-15 * high
    assert all((0 < rises) & (rises <= high / max(1, warmup) + rounding))
    assert all((-rounding <= falls) & (falls <= steepest + rounding))


# ---------------------------------------------------------------------------------------------------------------------
# The edges of fineweb.py's shards
# ---------------------------------------------------------------------------------------------------------------------

class Killed(BaseException):
    """Raised in the place of a SIGKILL."""


def kill_at(moment: int, patch) -> None:
    """Have fineweb.py die before or after one of its renames, which are all the steps that last."""
    replace, calls = manifest.replace, []

    def dying(temporary, path, *_, **__):
        calls.append(path)
        if len(calls) == moment // 2 + 1 and moment % 2 == 0:
            raise Killed
        replace(temporary, path)
        if len(calls) == moment // 2 + 1:
            raise Killed

    patch.setattr("plumbing.files.replace", dying)
    patch.setattr(manifest, "replace", dying)
    patch.setattr(manifest.Manifest, "drop_if_empty", lambda *_, **__: None)  # a kill leaves everything


TEXTS = st.none() | st.integers(0, 9).map(lambda n: " a" * n) | st.text("ab .\n", max_size=9)


@needs(*ENCODING, "datasets", "pyarrow")
@settings(max_examples=60)
@example(files=[["a"]], many=2100, cut=(1, 1, None), piece_bytes=40, moments=[3])
@example(files=[["a"]], many=110_000, cut=(1, 1, None), piece_bytes=40, moments=[3])
@example(files=[["", "", "", ""]], many=0, cut=(1, 0, None), piece_bytes=40, moments=[4])
@given(files=st.lists(st.lists(TEXTS, max_size=7), min_size=1, max_size=3), many=st.sampled_from([0, 0, 0, 2100]),
       cut=st.tuples(st.integers(1, 9), st.integers(0, 2), st.none() | st.integers(1, 60)),
       piece_bytes=st.integers(1, 40), moments=st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_shards_are_the_plain_tokens_wherever_they_end_and_whenever_it_was_killed(
        files, many, cut, piece_bytes, moments, tmp_path_factory, monkeypatch):
    """Of several files, read in pieces; with `many` tokens validation gets a window or, of 110,000, 1 % of them."""
    folder, files, (parts, more, limit) = tmp_path_factory.mktemp("texts"), [[*texts] for texts in files], cut
    files[-1] += [" a" * (many // 3)] * 3 * bool(many)
    (folder / "in").mkdir()
    for i, texts in enumerate(files):
        write_jsonl(folder / "in" / f"{i}.jsonl", texts)
    expected = plain_tokens(text for texts in files for text in texts if text is not None)[:limit]
    assume(len(expected))
    size = len(expected) // parts + more or 1
    options = {"source": folder / "in", "shard_size": size, "max_tokens": limit or 0, "tokenizer": "tiktoken",
               "num_proc": 1}
    set_piece_bytes(piece_bytes, monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda *_, **__: None)  # the machine stays on
    prepare(**options, out=folder / "whole")
    found = read_shards(folder / "whole")
    assert np.array_equal(np.concatenate(found), expected)
    sizes, left = [], len(expected)
    if left < 2 * size and left > 1:  # too few for a shard of each split: 1 %, a window or half are for validation
        sizes.append(max(left // 100, min(1025, left // 2)))
    while sum(sizes) < left:
        sizes.append(min(size, left - sum(sizes)))
    assert list(map(len, found)) == sizes
    record = json.loads((folder / "whole" / "manifest.json").read_text())
    assert [shard["documents"] for shard in record["shards"]] == [int((shard == EOT).sum()) for shard in found]
    for moment in moments:
        with monkeypatch.context() as patch:
            kill_at(moment, patch)
            try:
                prepare(**options, out=folder / "killed")
            except Killed:
                pass
    prepare(**options, out=folder / "killed")
    whole, killed = ({path.name: path.read_bytes() for path in (folder / name).iterdir() if path.suffix}
                     for name in ("whole", "killed"))
    assert killed == whole and len(whole) == len(found) + 1


# ---------------------------------------------------------------------------------------------------------------------
# HellaSwag's passes
# ---------------------------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 12), st.tuples(*[st.integers(1, 12)] * 4))  # tokens of a context and of its endings


@settings(max_examples=150)
@given(sizes=st.lists(SIZES, min_size=1, max_size=30), block_size=st.integers(1, 30),
       batch_tokens=st.integers(1, 60), world_size=st.integers(1, 5))
def test_every_row_is_in_one_pass_of_one_rank_and_passes_keep_their_limits(
        sizes, block_size, batch_tokens, world_size):
    work = [hellaswag.make_work(i, [7] * context, [[j] * n for j, n in enumerate(endings)], block_size)
            for i, (context, endings) in enumerate(sizes)]
    cost = [item.shared + sum(len(row.tokens) - item.shared - 1 for row in item.rows) for item in work]
    batches = make_batches(work, batch_tokens)
    numbers = [[item.rows[0].example for item in batch] for batch in batches]
    assert sorted(i for batch in numbers for i in batch) == list(range(len(sizes)))
    for batch, members in zip(batches, numbers):
        shared = [work[i].shared for i in members]
        assert batch[0].shared == min(shared) >= max(shared) - 3
        assert len(members) == 1 or sum(cost[i] for i in members) <= 16 * batch_tokens
        lengths = sorted(len(row.tokens) - 1 - min(shared) for item in batch for row in item.rows)
        passes = [lengths[part] for part in make_passes(lengths, batch_tokens)]
        assert [length for part in passes for length in part] == lengths and all(passes)
        fits = [keeps_limits(part, batch_tokens) for part in passes]
        assert all(fits) and min(lengths) > 0
        for part, following in itertools.pairwise(passes):  # no pass ends before it must
            assert not keeps_limits([*part, following[0]], batch_tokens)
    assigned = assign_batches(batches, world_size)
    assert len(assigned) == world_size
    given_to = [[item.rows[0].example for item in batch] for rank in assigned for batch in rank]
    assert sorted(given_to) == sorted(numbers)
    loads = [sum(cost[item.rows[0].example] for batch in rank for item in batch) for rank in assigned]
    assert max(loads) - min(loads) <= max(sum(cost[i] for i in batch) for batch in numbers)


def keeps_limits(lengths: list[int], batch_tokens: int) -> bool:
    """Whether these rows may be one pass: alone, or with few enough tokens and little enough padding."""
    padding = sum(max(lengths) - length for length in lengths)
    return len(lengths) == 1 or (sum(lengths) + padding <= batch_tokens and padding <= batch_tokens // 16)


@functools.cache
def small_model(block_size: int) -> GPT:
    """A model of 13 tokens that tells them apart."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=13, n_layer=2, n_head=2, n_embd=8))
    model.transformer.wte.weight.data.normal_()
    return model


@pytest.mark.usefixtures("alone")
@settings(max_examples=50)
@given(sizes=st.lists(SIZES, min_size=1, max_size=7), vocabulary=st.integers(1, 13), seed=st.integers(0, 2**32 - 1),
       block_size=st.integers(1, 24), batch_tokens=st.integers(1, 40), world_size=st.integers(1, 3))
def test_any_tokens_have_the_losses_of_their_rows_read_alone(
        sizes, vocabulary, seed, block_size, batch_tokens, world_size):
    """Contexts and endings of one token and more, equal ones, blocks shorter than either; row by row, uncached."""
    rng = np.random.default_rng(seed)
    texts = [[rng.integers(0, vocabulary, n).tolist() for n in (context, *endings)] for context, endings in sizes]
    model, read = small_model(block_size), []
    hook = model.transformer.wte.register_forward_hook(lambda module, inputs, _: read.append(inputs[0].size(1)))
    work = [hellaswag.make_work(i, context, endings, block_size) for i, (context, *endings) in enumerate(texts)]
    with torch.no_grad():
        found = sum(hellaswag.score_work(model, work, batch_tokens, World(rank, world_size))
                    for rank in range(world_size))  # of each example only one rank has losses
        hook.remove()
        expected = np.zeros((len(texts), 4))
        for i, (context, *endings) in enumerate(texts):
            for j, ending in enumerate(endings):
                for tokens, scored in hellaswag.cut_rows(context, ending, block_size):
                    logits = model(torch.tensor([tokens[:-1]]))[0, -scored:]
                    expected[i, j] += F.cross_entropy(logits, torch.tensor(tokens[-scored:]), reduction="sum").item()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert min(read) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Settings: which may differ when a run is resumed, and the flags that give them
# ---------------------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["a b", "it's", '"', "-x", "--seed", "a=b", "$HOME", "%s", "50 %", "\\", "n\u00e4ive", "*"])
WORDS |= st.text(string.ascii_letters + string.punctuation.replace("~", "") + " ", min_size=1, max_size=5)


def values_of(field) -> st.SearchStrategy:
    """Values that a field of TrainConfig or FineWebConfig may have; among the numbers also the largest."""
    kind, low, high = field.type, 0, 2**32 - 1
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind in (bool, bool | None):
        return st.booleans() if kind is bool else st.sampled_from([True, False, None])
    if get_origin(kind) is Annotated:
        kind, limits = get_args(kind)
        low, high = limits if kind is int else (low, high)
    if kind is str:
        return WORDS | st.just("") if field.default == "" or field.name == "sample_prompt" else WORDS
    return (st.integers if kind is int else st.floats)(low, high)


@st.composite
def some_values(draw, cls) -> dict:
    """Values for a few fields of a dataclass, most often for those that have rules of their own."""
    fields = dataclasses.fields(cls)
    fields += tuple(field for field in fields if field.name in ("data", "dtype", "branch_from")) * 6
    chosen = draw(st.lists(st.sampled_from(fields), max_size=6, unique_by=lambda field: field.name))
    return {field.name: draw(values_of(field)) for field in chosen}


def made(cls, values: dict):
    """The settings, if they do not contradict each other."""
    try:
        return cls(**values)
    except UserError as error:  # only for what two of them say together
        assert re.search("at most max|at least --num|less than --num|use HellaSwag|with --download|must be OWNER/NAME",
                         str(error)), error
        return assume(False)


def check_resume(now: TrainConfig, before: TrainConfig, has_hash: bool, free: set[str]) -> None:
    """Check that a run is refused exactly for the fields that may not differ, and that the flags it names mend it."""
    state = {"train_config": dataclasses.asdict(before), "data": {"sha256": "x"} if has_hash else {}, "step": 0,
             "origin_sha256": ""}
    differ = [name for name, value in vars(now).items() if value != vars(before)[name] and name not in free]
    differ = [name for name in differ if name != "dtype" or now.dtype != "auto"]  # it takes over the run's
    wrong = [name for name in differ if name != "data" or not has_hash]  # its hash is compared later
    if not wrong:
        run_folder.check_same_experiment(now, state, free, "log/model_000001.pt")
        return
    with pytest.raises(UserError) as caught:
        run_folder.check_same_experiment(now, state, free, "log/model_000001.pt")
    message, first, value = str(caught.value), wrong[0], vars(before)[wrong[0]]
    if first == "branch_from" and value == "":
        assert message == "log already holds a run: choose another --out_dir for the branch"
        return
    assert message.startswith(f"the run of log/model_000001.pt has --{first} {value}, not ")
    if first == "max_steps":  # which may well be meant
        assert f": continue with --max_steps {value}; to train longer" in message
        return
    words = re.search(r"(?:: continue with |its run, add )(.*?)(?:, or choose another --out_dir for a new run)?\Z",
                      message, re.DOTALL)[1]
    flags = cli.parse_flags(TrainConfig, shlex.split(words), "")
    assert flags == {name: vars(before)[name] for name in differ}
    run_folder.check_same_experiment(dataclasses.replace(now, **flags), state, free, "log/model_000001.pt")


@settings(max_examples=250)
@given(before=some_values(TrainConfig), changes=some_values(TrainConfig), has_hash=st.booleans(), branch=st.booleans())
def test_a_resume_is_refused_exactly_for_what_may_not_change_and_names_it(before, changes, has_hash, branch):
    free = train_gpt2.MAY_CHANGE_ON_BRANCH if branch else train_gpt2.MAY_CHANGE_ON_RESUME
    check_resume(made(TrainConfig, before | changes), made(TrainConfig, before), has_hash, free)


@settings(max_examples=150)
@given(values=some_values(TrainConfig), preset=st.sampled_from(list(train_gpt2.PRESETS)))
def test_the_command_of_any_settings_gives_them_again(values, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edu_fineweb10B").mkdir(exist_ok=True)
    (tmp_path / "edu_fineweb10B" / "x_val_000000.npy").touch()
    (tmp_path / "input.txt").touch()
    config = made(TrainConfig, train_gpt2.PRESETS[preset] | values)
    program, script, *words = shlex.split(runlog.command_line(config, train_gpt2.PRESETS, World()))
    assert (program, script) == ("python", "train_gpt2.py") and train_gpt2.parse_args(words) == config


@settings(max_examples=80)
@given(values=some_values(fineweb.FineWebConfig))
def test_the_command_that_fineweb_names_gives_its_settings(values):
    config = made(fineweb.FineWebConfig, values)
    program, script, *words = shlex.split(config.command)
    assert (program, script) == ("python", "fineweb.py")
    assert fineweb.FineWebConfig(**cli.parse_flags(fineweb.FineWebConfig, words, "")) == config
