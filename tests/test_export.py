"""export_hf.py and the import against transformers and lm-eval: the same bits there and back, nothing left behind.

    pytest tests/test_export.py
"""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    ENCODING,
    OURS,
    ROOT,
    error_of,
    flags,
    lm_eval_samples,
    needs,
    random_gpt2,
    read_log,
    run,
    slow,
    write_shards,
)

import export_hf
import train_gpt2
from plumbing import checkpoint, transformers_format
from plumbing.cli import UserError
from plumbing.tokenizer import gpt2_encoding
from train_gpt2 import GPT, MODELS, PADDED_VOCAB_SIZE, GPTConfig

pytestmark = needs(*ENCODING)

transformers = pytest.importorskip("transformers")

SCRIPT = ROOT / "export_hf.py"
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def save(folder, model, step=3):
    """A checkpoint of `model` alone, as training would write it."""
    folder.mkdir(exist_ok=True)
    return checkpoint.save(folder, step, {"model": model.state_dict(), "model_config": vars(model.config), "step": step,
                                          "optimizers": [], "train_config": {}, "val_loss": 1.5})


def random_gpt(**shape) -> GPT:
    """Our model with all weights random, biases and LayerNorms too, and a padded vocabulary."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=PADDED_VOCAB_SIZE, **shape))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def export(*arguments) -> str:
    """What the command prints with these arguments, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        export_hf.main(list(map(str, arguments)))
    return said.getvalue()


def train(**changes) -> None:
    """Run train_gpt2.py in this process."""
    train_gpt2.main(train_gpt2.parse_args(flags(**changes)))


@pytest.mark.parametrize("name", ["gpt2", slow("gpt2-medium"), slow("gpt2-large"), slow("gpt2-xl")])
def test_there_and_back_in_the_same_bits(name, tmp_path):
    shape = GPTConfig(**MODELS[name])
    ours = random_gpt(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=2 * shape.n_head, block_size=24)
    save(tmp_path / "log", ours)
    result = run([tmp_path / "log", tmp_path / "out"], script=SCRIPT)
    assert result.returncode == 0, result.stderr
    assert "loaded again by transformers 5" in result.stdout and "its logits differ by at most" in result.stdout

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    weights, state = theirs.state_dict(), ours.state_dict()
    assert set(weights) == set(state)
    for key, weight in weights.items():
        expected = state[key][:50257] if key in ("transformer.wte.weight", "lm_head.weight") else state[key]
        assert torch.equal(weight.t() if key.endswith(CONV1D) else weight, expected), key
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    idx = torch.randint(0, 50257, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx)[..., :50257], atol=1e-4, rtol=0)

    theirs.save_pretrained(tmp_path / "theirs")  # and from transformers' own files back to ours
    back = GPT.load(tmp_path / "theirs").state_dict()
    assert all(torch.equal(back[key], state[key][:50257] if "wte" in key or "lm_head" in key else state[key])
               for key in state)


WORDS = ["Hello world", " two\n\n\n  three \t", "don't WE'LL", "naïve 你好 🙂👩‍🚀", "<|endoftext|>x", "0123456789",
         "\u200b\u00a0"]


def test_auto_classes_load_it_and_agree_with_tiktoken(tmp_path):
    save(tmp_path / "log", random_gpt(n_layer=1, n_head=2, n_embd=16, block_size=32))
    export(tmp_path / "log", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = [tokenizer(text)["input_ids"] for text in WORDS]
    assert ids == [gpt2_encoding().encode(text, allowed_special="all") for text in WORDS]
    assert [tokenizer.decode(row) for row in ids] == WORDS
    assert (tokenizer.model_max_length, tokenizer.eos_token_id, len(tokenizer)) == (32, 50256, 50257)
    assert model.generation_config.eos_token_id == 50256 and model.dtype == torch.float32


@pytest.mark.slow
def test_auto_classes_load_it_without_a_word(tmp_path):
    """In a process of its own, as transformers says some things only once."""
    save(tmp_path / "log", random_gpt(n_layer=1, n_head=2, n_embd=16, block_size=32))
    export(tmp_path / "log", tmp_path / "out")
    script = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
print(len(tokenizer("Hello world")["input_ids"]))
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", script, str(tmp_path / "out")], capture_output=True,
                            text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "2\n", "")


def test_another_model_than_the_checkpoint_is_refused_and_deleted(tmp_path, monkeypatch):
    """A square matrix that is not transposed fits everywhere: only the logits show it."""
    save(tmp_path / "log", random_gpt(n_layer=1, n_head=2, n_embd=16, block_size=16))
    monkeypatch.setattr(transformers_format, "CONV1D", ("c_attn.weight", "c_fc.weight", "mlp.c_proj.weight"))
    with pytest.raises(UserError, match=r"other logits, by up to \d.*, and was deleted"):
        export_hf.main([str(tmp_path / "log"), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_weights_that_are_not_finite_are_refused_and_deleted(tmp_path):
    model = random_gpt(n_layer=1, n_head=2, n_embd=16, block_size=16)
    with torch.no_grad():
        model.transformer.wpe.weight[3] = float("nan")
    state = checkpoint.load(save(tmp_path / "log", random_gpt(n_layer=1, n_head=2, n_embd=16, block_size=16)))
    torch.save(state | {"model": model.state_dict()}, tmp_path / "log" / "model_000003.pt")  # save() would refuse
    assert "by up to nan, and was deleted" in error_of(export, tmp_path / "log", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_without_transformers_it_reads_what_it_wrote_itself(tmp_path):
    model = random_gpt(n_layer=1, n_head=2, n_embd=16, block_size=16)
    save(tmp_path / "log", model)
    script = tmp_path / "hide.py"
    script.write_text("import importlib.util, sys\nsys.modules['transformers'] = None\n"
                      "find = importlib.util.find_spec\n"
                      "importlib.util.find_spec = lambda name: None if name == 'transformers' else find(name)\n"
                      "import export_hf\nexport_hf.main(sys.argv[1:])\n")
    result = run([tmp_path / "log", tmp_path / "out"], script=script)
    difference = re.search(r"loaded again by train_gpt2.py itself.* differ by at most (\S+)\n", result.stdout)
    assert float(difference[1]) < 1e-15, result.stderr  # a product may differ in its last bit by where its rows lie
    again = GPT.load(tmp_path / "out").state_dict()
    assert all(torch.equal(weight[:len(again[name])], again[name]) for name, weight in model.state_dict().items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    train(data=write_shards(folder / "data"), out_dir=folder / "log")
    return folder / "log"


def test_the_model_card_is_the_run_s(trained, tmp_path):
    export(trained, tmp_path / "last")
    card, val = (tmp_path / "last" / "README.md").read_text(), read_log(trained, "val")
    assert card.startswith("---\nlibrary_name: transformers\n") and "# last" in card
    assert f"{val[-1]['loss']:.4f} after 6 steps" in card
    assert "768 in 6 steps of 128, windows of 16" in card
    assert f"torch {torch.__version__}" in card and "```sh\npython train_gpt2.py --data " in card
    assert f"Validation loss {val[0]['loss']:.2f} -> {val[-1]['loss']:.2f} in 6 steps. No reference" in card
    assert "Not measured: HellaSwag, any other benchmark" in card
    assert "No reference exists for the loss on this data" in card
    model = GPT.load(tmp_path / "last")
    assert len({path.stat().st_mode for path in (tmp_path / "last").iterdir()}) == 1
    assert f"{model.count_parameters():,} parameters" in card

    export(trained / "model_000004.pt", tmp_path / "earlier")
    card = (tmp_path / "earlier" / "README.md").read_text()
    assert f"{val[1]['loss']:.4f} after 3 steps" in card and "512 in 4 steps" in card

    export(tmp_path / "last", tmp_path / "again")
    assert "No log of its training could be read" in (tmp_path / "again" / "README.md").read_text()
    assert {path.name: path.read_bytes() for path in (tmp_path / "last").iterdir() if path.name != "README.md"} == {
        path.name: path.read_bytes() for path in (tmp_path / "again").iterdir() if path.name != "README.md"}


def test_an_exported_run_is_evaluated_and_trained_further(trained, tmp_path, capsys):
    """The loss of the export is the run's, but for the share of the rows that pad the vocabulary."""
    export(trained, tmp_path / "out")
    data = trained.parent / "data"
    train(data=data, init_from=tmp_path / "out", out_dir=tmp_path / "eval", max_steps=0)
    lines = [json.loads(line) for line in (tmp_path / "eval" / "eval.jsonl").read_text().splitlines()]
    padding = PADDED_VOCAB_SIZE / 50257 - 1  # what the extra rows of an untrained vocabulary take
    assert lines[-1]["loss"] == pytest.approx(read_log(trained, "val")[-1]["loss"], abs=2 * padding)
    capsys.readouterr()
    train(data=data, init_from=tmp_path / "out", out_dir=tmp_path / "tuned")
    assert f"from {tmp_path / 'out'}" not in capsys.readouterr().err
    assert read_log(tmp_path / "tuned", "val")[0]["loss"] == pytest.approx(lines[-1]["loss"], abs=1e-6)


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_is_there_already_stays(there, trained, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "out"
    if there == "link":
        out.symlink_to("nowhere")
    else:
        if there == "folder":
            out.mkdir()
            kept = out / "mine.txt"
        kept.write_text("mine")
    assert "exists already: name a new folder" in error_of(export, trained, out)
    assert there == "link" or kept.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("how", ["disk", "SIGTERM", "log"])
def test_trouble_leaves_nothing_behind(how, trained, tmp_path):
    """A disk that is full at 2 MB; a signal once something is written; a log of another program."""
    if how == "log":
        shutil.copytree(trained, tmp_path / "log")
        (tmp_path / "log" / "log.jsonl").write_text('{"kind": "run", "config": {"a": 1}}\n{"kind": "val", "step": 1}\n')
        export(tmp_path / "log", tmp_path / "out")
        assert "No log of its training could be read" in (tmp_path / "out" / "README.md").read_text()
        return
    pytest.importorskip("resource")
    script = tmp_path / "trouble.py"
    spoil = {"disk": "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
                     "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n",
             "SIGTERM": "write = export_hf.write_tokenizer\n"
                        "export_hf.write_tokenizer = lambda *args: (write(*args), os.kill(os.getpid(), 15))\n"}[how]
    script.write_text(f"import os, resource, signal, sys\nimport export_hf\nfrom plumbing import cli\n{spoil}"
                      "cli.run_command(export_hf.main, sys.argv[1:])\n")
    result = run([trained, tmp_path / "out"], script=script)
    assert result.returncode == (2 if how == "disk" else 128 + signal.SIGTERM), result.stderr
    assert "Traceback" not in result.stderr and ("is the disk full?" in result.stderr) == (how == "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trouble.py"]


@pytest.mark.parametrize("arguments, message", [
    ([], "has a checkpoint: train one first"),
    (["x"], "or name a model, such as python export_hf.py gpt2"),
    (["nothing", "out"], "no model 'nothing': name a folder"),
    (["small", "out"], "has 99 tokens, too few for GPT-2's encoding"),
    (["empty", "out"], "holds neither a whole checkpoint nor a transformers model"),
    (["full", "small/config.json/out"], "cannot make the folder"),
])
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch):
    random_gpt2(tmp_path / "small", n_layer=1, n_head=1, n_embd=8, vocab_size=99, n_positions=8)
    random_gpt2(tmp_path / "full", n_layer=1, n_head=1, n_embd=8, n_positions=8)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert message in error_of(export, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "small"]


def test_folders_in_parts_are_read(tmp_path):
    theirs = random_gpt2(tmp_path / "one", n_layer=2, n_head=2, n_embd=32, vocab_size=211, n_positions=24)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    one, parts = GPT.load(tmp_path / "one").state_dict(), GPT.load(tmp_path / "parts").state_dict()
    assert all(torch.equal(one[key], parts[key]) for key in one)


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: next(folder.glob("model-*2-of*")).unlink(), "No such file or directory"),
    (lambda folder: rename_part(folder, "../stolen.safetensors"), "its index names '../stolen.safetensors'"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "JSONDecodeError"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "KeyError"),
    (lambda folder: [path.unlink() for path in folder.glob("model*")], "there is no model.safetensors"),
    (lambda folder: [*[path.unlink() for path in folder.glob("model*")],
                     (folder / "pytorch_model.bin").write_bytes(b"x")], "pytorch_model.bin, which can run code"),
])
def test_folders_in_parts_that_are_not_whole(spoil, message, tmp_path):
    theirs = random_gpt2(tmp_path / "one", n_layer=2, n_head=2, n_embd=32, vocab_size=211, n_positions=24)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    spoil(tmp_path / "parts")
    assert message in error_of(export, tmp_path / "parts", tmp_path / "out")


def test_an_error_ends_the_command_with_code_2_and_one_line(tmp_path):
    result = run(["nothing", "out"], cwd=tmp_path, script=SCRIPT)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and result.stdout == ""
    assert result.stderr.startswith("error: no model 'nothing': name a folder")


@pytest.mark.parametrize("changes", [{"n_layer": 10_000_000}, {"n_layer": 1}, {"n_positions": 10**12},
                                     {"vocab_size": 10**12}, {"n_embd": 10**9}, {"n_layer": float("inf")},
                                     {"n_head": 0}])
def test_a_configuration_that_lies_is_refused_before_it_is_built(changes, tmp_path):
    random_gpt2(tmp_path / "model", n_layer=2, n_head=2, n_embd=8, vocab_size=99, n_positions=8)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    started = time.process_time()
    with pytest.raises((UserError, OSError)):
        GPT.load(tmp_path / "model")
    assert time.process_time() - started < 5


def rename_part(folder, name):
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = dict.fromkeys(values["weight_map"], name)
    index.write_text(json.dumps(values))


def harness_rows(path) -> list[dict]:
    """Real examples that lack ctx_a and ctx_b get them; an ending as long as the demo's block, lm-eval refuses."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    encode = gpt2_encoding().encode_ordinary
    return [{"ctx_a": row["ctx"], "ctx_b": "", **row} for row in rows
            if max(len(encode(" " + ending)) for ending in row["endings"]) < 63]


@pytest.mark.parametrize("data", [
    str(OURS), pytest.param(os.environ.get("HELLASWAG_DATA"), marks=pytest.mark.skipif(
        "HELLASWAG_DATA" not in os.environ, reason="HELLASWAG_DATA names no file of real examples"))])
@pytest.mark.slow
@needs("lm_eval")
def test_lm_eval_on_the_export_agrees_with_the_harness_style_on_the_checkpoint(data, tmp_path):
    """A demo checkpoint, its export, a local file: every prediction, and the accuracies."""
    rows, path = harness_rows(data), tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(["--data", ROOT / "input.txt", "--max_steps", "10", "--val_tokens", "6400", "--sample_every", "0",
                  "--out_dir", tmp_path / "log"])
    assert result.returncode == 0, result.stderr
    assert run([tmp_path / "log", tmp_path / "out"], script=SCRIPT).returncode == 0
    samples, results = lm_eval_samples(tmp_path / "out", path, tmp_path)
    result = run(["--model", tmp_path / "log", "--data", path, "--style", "harness", "--out", tmp_path / "ours.jsonl",
                  "--dtype", "float32"], script=ROOT / "hellaswag.py")
    assert result.returncode == 0, result.stderr
    ours = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
    assert len(ours) == len(samples) == len(rows)
    for mine, theirs in zip(ours, samples):
        assert mine["acc_prediction"] == np.argmin(theirs["losses"])
        lengths = [len(choice) for choice in theirs["choices"]]
        assert mine["acc_norm_prediction"] == np.argmin(np.divide(theirs["losses"], lengths))
    assert results["acc,none"] == np.mean([row["acc_prediction"] == row["label"] for row in ours])
    assert results["acc_norm,none"] == np.mean([row["acc_norm_prediction"] == row["label"] for row in ours])
