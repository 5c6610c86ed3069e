"""generate.py against transformers' generate and its own filters, and as a person uses it: streams, pipes, prompts.

    pytest tests/test_generate.py
"""
import functools
import os
import signal
import subprocess
import time

import pytest
import torch
from helpers import ENCODING, ROOT, command, flags, needs, random_gpt2, read_log, run

import generate as generate_command
from generate import GenerateConfig, continuations
from plumbing.cli import UserError
from plumbing.ranks import World
from plumbing.sampling import choose_token, generate, sample_text, stream_tokens
from plumbing.tokenizer import EOT, gpt2_encoding
from train_gpt2 import GPT, GPTConfig

pytestmark = needs(*ENCODING, "transformers")

SCRIPT = ROOT / "generate.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 with random weights and 48 positions, in transformers' layout, and their model of it."""
    folder = tmp_path_factory.mktemp("gpt2")
    theirs = random_gpt2(folder, std=0.1, n_layer=2, n_head=2, n_embd=32, n_positions=48)
    return folder, theirs


def write(folder, *arguments, **environment):
    """What the command does with a model folder, in float32."""
    return run(["--model", folder, "--device", "cpu", "--dtype", "float32", *arguments], script=SCRIPT, **environment)


def greedy(theirs, prompt, new_tokens, **settings) -> list[int]:
    """The tokens that transformers' generate puts after the prompt."""
    idx = torch.tensor([gpt2_encoding().encode_ordinary(prompt)])
    settings = {"eos_token_id": None, "pad_token_id": 0, **settings}
    result = theirs.generate(idx, max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(idx),
                             **settings)
    return result[0, idx.size(1):].tolist()


def test_greedy_text_is_that_of_transformers(folder):
    folder, theirs = folder
    tokens = greedy(theirs, "Once upon a time", 40)
    assert len(set(tokens)) > 5  # a model that repeats itself would agree too easily
    result = write(folder, "--prompt", "Once upon a time", "--max_new_tokens", "40", "--temperature", "0")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "Once upon a time" + gpt2_encoding().decode(tokens) + "\n"
    assert "1 thread, float32\n" in result.stderr and "(40 tokens in" in result.stderr


def test_it_stops_at_the_end_of_the_text(folder, tmp_path):
    """Where the greedy text has a token for the first time, a model with that token's row and EOT's swapped ends."""
    _, theirs = folder
    tokens = greedy(theirs, "Once upon a time", 40)
    last = next(i for i in range(8, 40) if tokens[i] not in tokens[:i])
    rows = list(range(50257))
    rows[EOT], rows[tokens[last]] = tokens[last], EOT
    weights = {name: value.clone() for name, value in theirs.state_dict().items()}
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = weights["transformer.wte.weight"][rows]
    swapped = type(theirs)(theirs.config).eval()
    swapped.load_state_dict(weights)
    swapped.save_pretrained(tmp_path)
    expected = greedy(swapped, "Once upon a time", 40, eos_token_id=EOT)
    assert expected == [*tokens[:last], EOT]
    result = write(tmp_path, "--prompt", "Once upon a time", "--max_new_tokens", "40", "--temperature", "0",
                   "--num_samples", "2")
    text = "Once upon a time" + gpt2_encoding().decode(tokens[:last]) + "\n"
    assert result.stdout == "--- sample 1 of 2\n" + text + "--- sample 2 of 2\n" + text


@pytest.mark.parametrize("temperature, top_k, top_p",
                         [(1.0, None, 1.0), (0.7, 12, 1.0), (1.3, None, 0.8), (1.0, 20, 0.6)])
def test_draws_have_the_probabilities_of_transformers_filters(temperature, top_k, top_p):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(1)
    model, n = GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=1, n_embd=16)), 20_000
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    idx = torch.randint(0, 40, (1, 5))
    filters = LogitsProcessorList([TemperatureLogitsWarper(float(temperature)),
                                   *([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(top_p)])
    with torch.no_grad():
        expected = filters(idx, model(idx)[:, -1]).softmax(dim=-1)[0]  # (V,)
    generator = torch.Generator().manual_seed(0)
    choose = functools.partial(choose_token, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    drawn = next(stream_tokens(model, idx, 1, choose, n))  # (n, 1)
    counts = drawn.flatten().bincount(minlength=40)
    assert not counts[expected == 0].any()
    assert (counts > 0).sum() > 3
    sigma = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() <= 5 * sigma + 1e-6).all()


@pytest.mark.parametrize("settings", [{"temperature": 1e-300}, {"temperature": 1e-42}, {"temperature": 1e-6},
                                      {"top_p": 1e-300}, {"top_p": 1e-9}, {"top_k": 1}])
def test_the_narrowest_draw_is_greedy(settings):
    torch.manual_seed(1)
    model, idx = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=1, n_head=1, n_embd=16)), torch.zeros(2, 3).long()
    expected = generate(model, idx, 9, temperature=0)
    assert torch.equal(generate(model, idx, 9, **settings), expected)


def test_the_widest_draw_leaves_no_token_out(monkeypatch):
    """top_p 1 is no filter, whatever the sum of 50,257 probabilities is in float32."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=16))
    seen = []
    with torch.no_grad():
        model.transformer.wte.weight.mul_(50)
        original = torch.multinomial
        monkeypatch.setattr(torch, "multinomial", lambda p, *args, **kw: seen.append(p) or original(p, *args, **kw))
        choose = functools.partial(choose_token, top_k=None)
        next(stream_tokens(model, torch.zeros(1, 1).long(), 1, choose))
    assert (seen[0] > 0).all()


def test_a_prompt_is_read_once_for_all_its_samples():
    torch.manual_seed(0)
    model, read = GPT(GPTConfig(block_size=32, vocab_size=60, n_layer=2, n_head=2, n_embd=16)), []
    idx = torch.randint(0, 60, (2, 9))
    plain = generate(model, idx, 12, temperature=0)
    handle = model.transformer.wte.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    choose = functools.partial(choose_token, temperature=0)
    result = torch.cat(list(stream_tokens(model, idx, 12, choose, num_samples=3)), dim=1)
    handle.remove()
    assert torch.equal(result, plain[:, 9:].repeat_interleave(3, dim=0))
    assert read == [2 * 9] + [2 * 3] * 11  # and the last token is not read


def test_past_the_block_size_the_window_slides(folder):
    """48 positions: every later token is the likeliest after the 48 before it."""
    folder, theirs = folder
    tokens = gpt2_encoding().encode_ordinary("Once upon a time")
    with torch.no_grad():
        for _ in range(60):
            tokens.append(theirs(torch.tensor([tokens[-48:]])).logits[0, -1].argmax().item())
    result = write(folder, "--prompt", "Once upon a time", "--max_new_tokens", "60", "--temperature", "0")
    assert result.stdout == gpt2_encoding().decode(tokens) + "\n"
    result = write(folder, "--prompt", "word " * 500, "--max_new_tokens", "3", "--temperature", "0")
    assert result.returncode == 0 and result.stdout.startswith("word " * 500)


def test_characters_are_never_torn(monkeypatch):
    """Tokens that end within a character: what is shown is whole, and torn only where the text itself is."""
    text = "naïve 你好世界 🙂👩‍🚀 ﷽ e\u0301"
    ids = gpt2_encoding().encode_ordinary(text)
    torn = sum("\ufffd" in gpt2_encoding().decode([token]) for token in ids)
    assert torn > 8
    half = gpt2_encoding().encode_ordinary("🙂")[0]
    script = torch.tensor([[*ids, EOT, 13], [*ids[:-1], half, 13, half]])
    monkeypatch.setattr(generate_command, "stream_tokens", lambda *arguments, **__: iter(script.t().unsqueeze(2)))
    model, generator = GPT(GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=2)), torch.Generator()
    config = GenerateConfig(num_samples=2, max_new_tokens=script.size(1))
    pieces = list(continuations(model, "x", config, generator))
    first, second = ("".join(piece for sample, piece, _ in pieces if sample == i) for i in (0, 1))
    assert first == text and [piece for sample, piece, _ in pieces if sample == 0 and "\ufffd" in piece] == []
    assert second.endswith("\ufffd.\ufffd")  # what is torn at the end too
    assert sum(made for _, _, made in pieces) == len(ids) + 1 + script.size(1)


def test_text_comes_while_it_is_made(folder):
    """The first bytes arrive long before the last, and every piece that arrives is whole UTF-8."""
    folder, _ = folder
    arguments = ["--model", folder, "--device", "cpu", "--max_new_tokens", "1500", "--top_k", "0", "--prompt", "x"]
    process = subprocess.Popen(command(arguments, script=SCRIPT), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pieces, times = [], []
    while piece := os.read(process.stdout.fileno(), 1 << 16):
        pieces.append(piece.decode("utf-8"))  # strict
        times.append(time.perf_counter())
    assert process.wait() == 0
    assert len(pieces) > 100 and times[-1] - times[0] > 0.5
    assert "\ufffd" in "".join(pieces)  # random weights write half characters too


def test_it_writes_what_training_sampled(shard_folder, tmp_path):
    """The sample in the log and the command with the same prompt and seed are one function's."""
    arguments = flags(data=shard_folder, out_dir=tmp_path / "out", sample_every=6, sample_prompt="The sea")
    assert run(arguments).returncode == 0
    result = write(tmp_path / "out", "--prompt", "The sea", "--max_new_tokens", "32", "--seed", "42")
    assert result.stdout == read_log(tmp_path / "out", "sample")[-1]["text"] + "\n"
    again = write(tmp_path / "out" / "model_000006.pt", "--prompt", "The sea", "--max_new_tokens", "32", "--seed", "7")
    assert again.returncode == 0 and again.stdout != result.stdout


@pytest.mark.parametrize("prompt, starts", [("-", "naïve 你好"), ("", "")])
def test_prompts_from_stdin_and_none_at_all(prompt, starts, folder):
    folder, theirs = folder
    result = subprocess.run(command(["--model", folder, "--device", "cpu", "--dtype", "float32", "--prompt", prompt,
                                     "--max_new_tokens", "5", "--temperature", "0"], script=SCRIPT),
                            input="naïve 你好\n".encode(), capture_output=True)
    idx = torch.tensor([gpt2_encoding().encode_ordinary(starts) or [EOT]])
    tokens = theirs.generate(idx, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0,
                             attention_mask=torch.ones_like(idx))[0, idx.size(1):].tolist()
    assert result.stdout.decode() == starts + gpt2_encoding().decode(tokens) + "\n", result.stderr


def test_interactive_answers_each_line_until_the_end(folder):
    folder, theirs = folder
    result = subprocess.run(command(["--model", folder, "--device", "cpu", "--dtype", "float32", "--interactive",
                                     "--max_new_tokens", "5", "--temperature", "0"], script=SCRIPT),
                            input="Once\n\nThe sea\n", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answers = [prompt + gpt2_encoding().decode(greedy(theirs, prompt, 5)) for prompt in ("Once", "The sea")]
    assert result.stdout == "{}\n{}\n".format(*answers)


@pytest.mark.skipif(os.name != "posix", reason="signals as a terminal sends them")
def test_ctrl_c_stops_the_text_and_not_the_conversation(folder):
    folder, _ = folder
    arguments = ["--model", folder, "--device", "cpu", "--interactive", "--max_new_tokens", "1000000"]
    process = subprocess.Popen(command(arguments, script=SCRIPT), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    for _ in range(2):
        process.stdin.write("The sea\n")
        process.stdin.flush()
        process.stdout.read(100)  # it is writing
        process.send_signal(signal.SIGINT)
    process.stdin.close()
    process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read().count("(stopped)") == 2


def test_a_conversation_goes_on_after_a_prompt_of_any_length(folder):
    result = subprocess.run(command(["--model", folder[0], "--device", "cpu", "--interactive", "--max_new_tokens", "2"],
                                    script=SCRIPT), input="x" * 200_001 + "\nOnce\n", capture_output=True, text=True)
    assert result.returncode == 0 and "error" not in result.stderr
    assert result.stdout.startswith("x" * 200_001) and "\nOnce" in result.stdout


def test_closed_streams_do_no_harm(folder):
    words = " ".join(command(["--model", folder[0], "--device", "cpu", "--max_new_tokens", "2"], script=SCRIPT))
    result = subprocess.run(["bash", "-c", f"{words} 2>&-"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("Hello, I'm") and "parameters" not in result.stdout
    result = subprocess.run(["bash", "-c", f"{words} --prompt - <&-"], capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_a_reader_that_leaves_ends_it_quietly(folder):
    folder, _ = folder
    arguments = ["--model", folder, "--device", "cpu", "--max_new_tokens", "1000000"]
    process = subprocess.Popen(command(arguments, script=SCRIPT), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert "rror" not in process.stderr.read()


@pytest.mark.parametrize("arguments, message", [
    (["--num_samples", "0"], "--num_samples is 0, it must be a number from 1 to 10000"),
    (["--max_new_tokens", "0"], "--max_new_tokens is 0, it must be a number from 1 to 1000000"),
    (["--temperature", "-1"], "--temperature is -1.0, it must be a number from 0 to"),
    (["--temperature", "nan"], "--temperature is nan, it must be a number from 0 to"),
    (["--top_k", "-5"], "--top_k is -5, it must be a number from 0 to"),
    (["--top_p", "0"], "--top_p is 0.0, it must be more than 0 and at most 1"),
    (["--top_p", "1.5"], "--top_p is 1.5, it must be a number from 0 to 1"),
    (["--seed", "-1"], "--seed is -1, it must be a number from 0 to"),
    (["--interactive", "--prompt", "x"], "--interactive asks for prompts: leave --prompt out"),
    (["--dtype", "int8"], "--dtype is 'int8', it must be auto, float32, bfloat16 or float16"),
    (["--model", "gpt3"], "no model 'gpt3': name a folder, a .pt file or one of gpt2, gpt2-medium"),
    (["--model", "."], "holds neither a whole checkpoint nor a transformers model"),
])
def test_wrong_flags_and_values(arguments, message, folder, tmp_path):
    arguments = arguments if "--model" in arguments else ["--model", str(folder[0]), *arguments]
    result = subprocess.run(command(arguments, script=SCRIPT), cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_models_that_cannot_write(tmp_path):
    random_gpt2(tmp_path / "small", n_layer=1, n_head=1, n_embd=8, vocab_size=99, n_positions=8)
    result = write(tmp_path / "small")
    assert result.returncode == 2 and "has 99 tokens, too few for GPT-2's encoding" in result.stderr
    theirs = random_gpt2(tmp_path / "nan", n_layer=1, n_head=1, n_embd=8, n_positions=8)
    theirs.transformer.wpe.weight.data[0, 0] = float("nan")
    theirs.save_pretrained(tmp_path / "nan")
    result = write(tmp_path / "nan")
    assert result.returncode == 2 and "has weights that are not finite" in result.stderr


def test_a_prompt_of_a_million_blanks_is_read_to_its_end(folder):
    arguments = ["--model", folder[0], "--prompt", "-", "--max_new_tokens", "2", "--device", "cpu"]
    results = [subprocess.run(command(arguments, script=SCRIPT), input=text, capture_output=True, text=True)
               for text in ("x" + " " * 1_200_000 + "The end", "y" + " " * 1_200_000 + "The end")]
    assert all(result.returncode == 0 for result in results), results[0].stderr
    assert results[0].stdout[1:] == results[1].stdout[1:] and len(results[0].stdout) > 1_200_000


def test_stdin_that_is_no_text(folder):
    result = subprocess.run(command(["--model", folder[0], "--prompt", "-"], script=SCRIPT), input=b"\xff\xfe",
                            capture_output=True)
    assert result.returncode == 2 and b"error: stdin is not UTF-8 text" in result.stderr


def test_logits_that_are_not_finite_are_told_in_training_and_in_the_stream():
    model, idx = GPT(GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=8)), torch.zeros(1, 2).long()
    for bad in (float("nan"), float("inf")):
        torch.nn.init.constant_(model.transformer.ln_f.bias, bad)
        with pytest.raises(UserError, match="the logits are not finite: use --dtype float32"):
            next(stream_tokens(model, idx, 1, choose_token))
        sample = sample_text(model, "Once", World())
        assert sample.startswith("(no sample: the logits are not finite")
