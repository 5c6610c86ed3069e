"""generate.py against transformers' generate and its own filters, and as a person uses it: streams, pipes, prompts.

    pytest tests/test_generate.py
"""
import contextlib
import functools
import io
import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers import ENCODING, ROOT, command, error_of, flags, needs, posix, random_gpt2, read_log, run

import generate as generate_command
import train_gpt2
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


def write(folder, *arguments, stdin=b"") -> SimpleNamespace:
    """What the command does with a model folder, in float32, in this process: its stdout and stderr."""
    streams = [contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())]
    with streams[0] as stdout, streams[1] as stderr, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        generate_command.main(["--model", str(folder), "--device", "cpu", "--dtype", "float32", *arguments])
    return SimpleNamespace(stdout=stdout.getvalue(), stderr=stderr.getvalue())


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
    result = run(["--model", folder, "--device", "cpu", "--dtype", "float32", "--prompt", "Once upon a time",
                  "--max_new_tokens", "40", "--temperature", "0"], script=SCRIPT)
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
    assert result.stdout.startswith("word " * 500)


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


def test_each_piece_of_the_text_is_flushed(folder):
    class Stream(io.StringIO):
        lengths = ()

        def flush(self):
            self.lengths = (*self.lengths, len(self.getvalue()))

    with contextlib.redirect_stdout(Stream()) as stream:
        generate_command.main(["--model", str(folder[0]), "--device", "cpu", "--max_new_tokens", "40"])
    assert len(set(stream.lengths)) > 30  # some of the tokens end within a character


def test_it_writes_what_training_sampled(shard_folder, tmp_path):
    """The sample in the log and the command with the same prompt and seed are one function's."""
    arguments = flags(data=shard_folder, out_dir=tmp_path / "out", sample_every=6, sample_prompt="The sea")
    train_gpt2.main(train_gpt2.parse_args(arguments))
    result = write(tmp_path / "out", "--prompt", "The sea", "--max_new_tokens", "32", "--seed", "42")
    assert result.stdout == read_log(tmp_path / "out", "sample")[-1]["text"] + "\n"
    again = write(tmp_path / "out" / "model_000006.pt", "--prompt", "The sea", "--max_new_tokens", "32", "--seed", "7")
    assert again.stdout != result.stdout


def greedy_from(theirs, starts: str) -> str:
    """Five tokens that transformers' generate puts after a text, which may be empty, and the text before them."""
    idx = torch.tensor([gpt2_encoding().encode_ordinary(starts) or [EOT]])
    tokens = theirs.generate(idx, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0,
                             attention_mask=torch.ones_like(idx))[0, idx.size(1):].tolist()
    return starts + gpt2_encoding().decode(tokens) + "\n"


def test_a_prompt_comes_from_stdin(folder):
    folder, theirs = folder
    result = subprocess.run(command(["--model", folder, "--device", "cpu", "--dtype", "float32", "--prompt", "-",
                                     "--max_new_tokens", "5", "--temperature", "0"], script=SCRIPT),
                            input="naïve 你好\n".encode(), capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert result.stdout.decode() == greedy_from(theirs, "naïve 你好"), result.stderr


def test_a_text_without_a_prompt_begins_as_a_document_does(folder):
    folder, theirs = folder
    result = write(folder, "--prompt", "", "--max_new_tokens", "5", "--temperature", "0")
    assert result.stdout == greedy_from(theirs, "")


def test_interactive_answers_each_line_until_the_end(folder):
    folder, theirs = folder
    result = write(folder, "--interactive", "--max_new_tokens", "5", "--temperature", "0", stdin=b"Once\n\nThe sea\n")
    answers = [prompt + gpt2_encoding().decode(greedy(theirs, prompt, 5)) for prompt in ("Once", "The sea")]
    assert result.stdout == "{}\n{}\n".format(*answers)


@posix
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
    result = write(folder[0], "--interactive", "--max_new_tokens", "2", stdin=b"x" * 200_001 + b"\nOnce\n")
    assert "error" not in result.stderr
    assert result.stdout.startswith("x" * 200_001) and "\nOnce" in result.stdout


@pytest.mark.slow
@posix
@pytest.mark.parametrize("closed", ["2>&-", "--prompt - <&-"])
def test_closed_streams_do_no_harm(closed, folder):
    words = " ".join(command(["--model", folder[0], "--device", "cpu", "--max_new_tokens", "2"], script=SCRIPT))
    result = subprocess.run(["bash", "-c", f"{words} {closed}"], capture_output=True, text=True)
    assert result.returncode == 0 and "parameters" not in result.stdout and "Traceback" not in result.stderr
    assert result.stdout.startswith("Hello, I'm") or "<" in closed


@posix
def test_text_comes_while_it_is_made_and_a_reader_that_leaves_ends_it_quietly(folder):
    """Of a text that would take hours, pieces arrive, each whole UTF-8."""
    folder, _ = folder
    arguments = ["--model", folder, "--device", "cpu", "--max_new_tokens", "1000000", "--top_k", "0"]
    process = subprocess.Popen(command(arguments, script=SCRIPT), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONUTF8": "1"})
    pieces = [os.read(process.stdout.fileno(), 1 << 16).decode("utf-8") for _ in range(50)]  # strict
    process.stdout.close()
    assert all(pieces)
    assert process.wait(timeout=300) == 128 + signal.SIGPIPE
    assert b"rror" not in process.stderr.read()


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
def test_wrong_flags_and_values(arguments, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = arguments if "--model" in arguments else ["--model", str(folder[0]), *arguments]
    assert message in error_of(generate_command.main, arguments)
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_command_with_code_2_and_one_line(tmp_path):
    result = run(["--model", tmp_path], script=SCRIPT)
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert "holds neither a whole checkpoint nor a transformers model" in result.stderr


def test_models_that_cannot_write(tmp_path):
    random_gpt2(tmp_path / "small", n_layer=1, n_head=1, n_embd=8, vocab_size=99, n_positions=8)
    assert "has 99 tokens, too few for GPT-2's encoding" in error_of(write, tmp_path / "small")
    theirs = random_gpt2(tmp_path / "nan", n_layer=1, n_head=1, n_embd=8, n_positions=8)
    theirs.transformer.wpe.weight.data[0, 0] = float("nan")
    theirs.save_pretrained(tmp_path / "nan")
    assert "has weights that are not finite" in error_of(write, tmp_path / "nan")


def test_a_prompt_beyond_the_model_s_rows_is_refused():
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(UserError, match="the prompt has the token 15496, but the model only 50 rows of vocabulary"):
        next(continuations(model, "Hello", GenerateConfig(), torch.Generator()))


def test_a_prompt_of_a_million_blanks_is_read_to_its_end(folder):
    results = [write(folder[0], "--prompt", "-", "--max_new_tokens", "2", stdin=letter + b" " * 1_200_000 + b"The end")
               for letter in (b"x", b"y")]
    assert results[0].stdout[1:] == results[1].stdout[1:] and len(results[0].stdout) > 1_200_000


def test_stdin_that_is_no_text(folder):
    with pytest.raises(UserError, match="stdin is not UTF-8 text"):
        write(folder[0], "--prompt", "-", stdin=b"\xff\xfe")


def test_logits_that_are_not_finite_are_told_in_training_and_in_the_stream():
    model, idx = GPT(GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=8)), torch.zeros(1, 2).long()
    for bad in (float("nan"), float("inf")):
        torch.nn.init.constant_(model.transformer.ln_f.bias, bad)
        with pytest.raises(UserError, match="the logits are not finite: use --dtype float32"):
            next(stream_tokens(model, idx, 1, choose_token))
        sample = sample_text(model, "Once", World())
        assert sample.startswith("(no sample: the logits are not finite")
