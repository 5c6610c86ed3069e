"""The model against transformers' GPT-2, and against what the paper and the formulas say.

    pytest tests/test_model.py
"""
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, random_gpt2
from safetensors.torch import load_file, save_file

from plumbing import machine
from plumbing.sampling import generate, new_cache
from train_gpt2 import GPT, MODELS, PADDED_VOCAB_SIZE, GPTConfig, TrainConfig, build_model

transformers = pytest.importorskip("transformers")

SMALL = GPTConfig(block_size=24, vocab_size=211, n_layer=3, n_head=4, n_embd=32)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_logits_equal_transformers(name, tmp_path):
    config = GPTConfig(**MODELS[name])
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": 4 * config.n_head}
    shape |= {"vocab_size": 301, "n_positions": 40}
    theirs = random_gpt2(tmp_path, **shape)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(0, 301, (2, 40))
    with torch.no_grad():
        expected, logits = theirs(idx).logits, ours(idx)
    assert expected.std() > 0.1  # a model that says nothing would agree with anything
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    loss = ours(idx, idx)
    torch.testing.assert_close(loss, F.cross_entropy(expected.view(-1, 301), idx.view(-1)), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_logits_equal_transformers_at_124m(tmp_path):
    theirs = random_gpt2(tmp_path, std=0.02)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(0, 50257, (1, 1024))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)


def test_reads_openai_s_files(tmp_path):
    """OpenAI's files on the hub have no `transformer.` prefix, no lm_head, and carry the attention masks."""
    theirs = random_gpt2(tmp_path, n_layer=2, n_head=2, n_embd=8, vocab_size=53, n_positions=16)
    weights = {key.removeprefix("transformer."): value
               for key, value in load_file(tmp_path / "model.safetensors").items() if key != "lm_head.weight"}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    save_file(weights, tmp_path / "model.safetensors")
    idx = torch.randint(0, 53, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(GPT.load(tmp_path)(idx), theirs(idx).logits, atol=1e-4, rtol=0)


def test_parameter_count_and_keys():
    with torch.device("meta"):
        model = GPT(GPTConfig())
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert model.count_parameters() == 124_439_808
    assert set(model.state_dict()) == set(theirs.state_dict())
    assert machine.flops_per_token(model, 1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("name, millions", [("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)])
def test_sizes(name, millions):
    with torch.device("meta"):
        assert round(GPT(GPTConfig(**MODELS[name])).count_parameters() / 1e6) == millions


@pytest.mark.parametrize("n_embd", [64, 768])
def test_first_loss_is_that_of_a_uniform_guess(n_embd):
    """ln V, and half the variance of the logits on top: C channels of variance 1 meet a wte of std 0.02."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=n_embd))
    idx = torch.randint(0, 50257, (4, 129))
    with torch.no_grad():
        loss = model(idx[:, :-1], idx[:, 1:]).item()
    assert loss == pytest.approx(math.log(50257) + n_embd * 0.02**2 / 2, abs=0.03)
    assert n_embd > 64 or abs(loss - math.log(50257)) < 0.1


def test_std_of_every_kind_of_weight():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=5000, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < std * 0.05, name


def test_causality():
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    idx = torch.randint(0, 211, (1, 24))
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 211
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10], after[:, 10])


def test_the_mode_of_the_module_changes_nothing():
    model, idx = GPT(SMALL), torch.randint(0, 211, (2, 24))
    logits, loss = model(idx), model(idx, idx)
    assert logits.shape == (2, 24, 211) and loss.shape == ()
    assert torch.equal(model.eval()(idx), logits) and torch.equal(model(idx, idx), loss)


@pytest.mark.parametrize("cuts", [(24,), (1,) * 24, (7, 1, 9, 7)])
def test_cached_logits_equal_uncached(cuts):
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    idx, cache = torch.randint(0, 211, (3, 24)), new_cache(model)
    with torch.no_grad():
        pieces = torch.cat([model(piece, cache=cache) for piece in idx.split(cuts, dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(idx), atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="25 positions"):
            model(idx[:, :1], cache=cache)


def test_greedy_tokens_equal_transformers(tmp_path):
    theirs = random_gpt2(tmp_path, n_layer=2, n_head=2, n_embd=32, vocab_size=211, n_positions=64)
    idx = torch.randint(0, 211, (2, 5))
    expected = theirs.generate(idx, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(GPT.from_pretrained(tmp_path), idx, 40, temperature=0), expected)


def test_generation_slides_past_the_block_size():
    torch.manual_seed(0)
    model = GPT(SMALL)
    idx = torch.randint(0, 211, (1, 20))
    result, expected = generate(model, idx, 12, temperature=0), idx
    assert model.training  # it leaves the model in the mode it found
    for _ in range(12):
        logits = model.eval()(expected[:, -24:])
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(result, expected)


def test_sampling_repeats_by_seed_and_never_yields_padding():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=PADDED_VOCAB_SIZE, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.wte.weight[50257:] = 100 * model.transformer.ln_f.weight  # padding that shouts
    start = torch.zeros(48, 1, dtype=torch.int64)
    draws = [generate(model, start, 3, top_k=None, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].max() < 50257
    assert len(draws[0][:, 1].unique()) > 32  # without top_k the draw is wide
    narrow = generate(model, start, 1, top_k=2, generator=torch.Generator().manual_seed(3))
    assert len(narrow[:, 1].unique()) <= 2


@pytest.mark.slow
def test_compiled_model_has_the_loss_and_gradient_of_the_plain_one():
    torch.manual_seed(0)
    model, idx = GPT(SMALL), torch.randint(0, 211, (2, 24))
    results = []
    for forward in (model, torch.compile(model, dynamic=False)):
        model.zero_grad()
        loss = forward(idx, idx)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", [False, True])
def test_activation_checkpointing_is_what_the_settings_say(wanted):
    config = TrainConfig(n_layer=1, n_head=1, n_embd=8, sequence_length=8, activation_checkpointing=wanted)
    assert build_model(config, None).activation_checkpointing is wanted


def test_activation_checkpointing_saves_memory_and_changes_no_bit():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(32, 64, 4, 2, 32)), torch.randint(0, 64, (2, 32))
    seen = []
    for model.activation_checkpointing in (False, True):
        saved = {}

        def keep(t, saved=saved):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(idx, idx)
        model.zero_grad()
        loss.backward()
        seen.append((loss.item(), [p.grad.clone() for p in model.parameters()], sum(saved.values())))
    (loss, grads, memory), (again, grads_again, less) = seen
    assert loss == again and all(map(torch.equal, grads, grads_again))
    assert less < 0.5 * memory


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_is_freed_is_kept_for_the_next_step():
    code = ("import resource, sys, torch\nfrom plumbing import machine\n"
            "if sys.argv[1] == 'keep': machine.keep_freed_memory()\n"
            "for i in range(20):\n"
            "    if i == 10: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    torch.ones(2**24)\n"  # 64 MiB
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    keep, give = (min(int(subprocess.check_output([sys.executable, "-c", code, how], cwd=ROOT, text=True,
                                                  env={**environment, "THP_MEM_ALLOC_ENABLE": "1"}))
                      for _ in range(tries)) for how, tries in (("keep", 3), ("give", 1)))
    # the least of three: a system short of memory takes huge pages apart meanwhile, and counts that too
    assert keep < 10 and give > 10 * 2**5 * 0.9  # 64 MiB are 32 huge pages, or 16,384 small ones
