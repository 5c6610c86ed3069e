"""Checkpoints of other programs: nanoGPT's and build-nanogpt's are read, and run no code; others are named.

    pytest tests/test_foreign.py
"""
import concurrent.futures
import os
import signal
import struct
import zipfile

import pytest
import torch
from helpers import ENCODING, OURS, error_of, flags, nanogpt, needs, write_build_nanogpt

import export_hf
import generate
import hellaswag
import train_gpt2
from plumbing import checkpoint, foreign, models
from plumbing.checkpoint import CheckpointError
from plumbing.cli import UserError
from train_gpt2 import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

SHAPE = dict(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=8)
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def make_theirs(biases=True, **changes):
    """(transformers' GPT-2 with random weights, the same weights under nanoGPT's names in nn.Linear's layout)."""
    shape = {**SHAPE, **changes}
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=shape["vocab_size"], n_positions=shape["block_size"],
                                     n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"])
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.4)
        if name.endswith(".bias") and not biases:
            torch.nn.init.zeros_(p)
    weights = {name: (weight.t() if name.endswith(CONV1D) else weight).contiguous()
               for name, weight in model.state_dict().items() if biases or not name.endswith(".bias")}
    return model, weights


def same_logits(source, theirs):
    ours = GPT.load(source).eval()
    idx = torch.randint(0, theirs.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(idx), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def model_19072(tmp_path_factory):
    """What build-nanogpt's script saves of make_theirs()'s weights."""
    return write_build_nanogpt(tmp_path_factory.mktemp("build_nanogpt") / "model_19072.pt", make_theirs()[1])


@pytest.mark.parametrize("prefix, biases", [
    ("", True), ("_orig_mod.", False), ("module.", True), ("module._orig_mod.", False), ("_orig_mod.module.", True)])
def test_nanogpt_s_checkpoint_gives_the_logits_of_transformers(prefix, biases, tmp_path):
    theirs, weights = make_theirs(biases)
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()  # the mask of a PyTorch before 2.0
    torch.save(nanogpt(weights, prefix, biases), tmp_path / "ckpt.pt")
    same_logits(tmp_path / "ckpt.pt", theirs)
    os.rename(tmp_path / "ckpt.pt", tmp_path / "renamed")
    same_logits(tmp_path / "renamed", theirs)


def test_build_nanogpt_s_checkpoint_gives_the_logits_of_transformers(model_19072):
    same_logits(model_19072, make_theirs()[0])


def test_reading_it_works_in_several_threads_and_leaves_pytorch_s_list_as_it_was(model_19072):
    before = set(torch.serialization.get_safe_globals())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for state in pool.map(models.find, [model_19072] * 16):
            assert state["program"] == "build-nanogpt" and state["step"] == 19072
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(Exception, match="GPTConfig"):
        torch.load(model_19072, weights_only=True)


class Evil:
    def __init__(self, path, blocked=False):
        self.path, self.blocked = str(path), blocked

    def __reduce__(self):
        return (os.mkdir, (self.path,)) if self.blocked else (exec, (f"import os; os.mkdir({self.path!r})",))


class Setter:
    """Its state is set by BUILD, which for a class of the program would call __setstate__."""

    def __setstate__(self, state):
        raise AssertionError("code of the file's class has run")


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("where", ["config", "model_args", "model", "whole", "iter_num"])
def test_no_code_of_a_file_is_run(where, blocked, tmp_path):
    _, weights = make_theirs()
    evil, content = Evil(tmp_path / "broken_into", blocked), nanogpt(weights)
    setter = Setter()
    setter.x = 1
    content["config"] = setter
    if where == "whole":
        content = evil
    elif where == "config":
        content = {"model": weights, "config": evil, "step": 1}
    elif where == "model":
        content["model"]["x"] = evil
    else:
        content[where] = evil
    torch.save(content, tmp_path / "ckpt.pt")
    if where == "iter_num" and not blocked:
        assert models.find(tmp_path / "ckpt.pt")["step"] == 0
    else:
        with pytest.raises(CheckpointError):
            models.find(tmp_path / "ckpt.pt")
    foreign.read(tmp_path / "ckpt.pt")
    assert not (tmp_path / "broken_into").exists()


@pytest.mark.parametrize("spoil, message", [
    (lambda c: c["model"].pop("_orig_mod.transformer.h.1.mlp.c_fc.bias"), "no tensor transformer.h.1.mlp.c_fc.bias"),
    (lambda c: c["model"].pop("_orig_mod.transformer.wte.weight"), "no tensor transformer.wte.weight"),
    (lambda c: c["model"].update({"_orig_mod.transformer.h.0.attn.q_norm.weight": torch.ones(4)}), "q_norm"),
    (lambda c: c["model"].update({"_orig_mod.lm_head.weight": torch.ones(50304, 8)}), "lm_head.weight is another"),
    (lambda c: c["model"].update({"transformer.wte.weight": torch.ones(50304, 8)}), "two tensors"),
    (lambda c: c["model"].update({"_orig_mod.transformer.ln_f.bias": torch.ones(8).to(torch.int8)}), "is int8"),
    (lambda c: c["model_args"].pop("n_head"), "n_head"),
    (lambda c: c["model_args"].update(n_layer=10**9), "tensors for 1000000000 layers"),
    (lambda c: c["model_args"].update(n_layer=10**9, bias=False), "tensors for 1000000000 layers"),
    (lambda c: c["model_args"].update(n_embd="many"), "many"),
])
def test_a_nanogpt_that_is_no_gpt2_is_refused_by_name(spoil, message, tmp_path):
    content = nanogpt(make_theirs()[1])
    spoil(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        GPT.load(tmp_path / "ckpt.pt")
    assert "ckpt.pt seems to be nanoGPT's" in str(error.value) and "\n" not in str(error.value)


def test_a_note_says_that_nanogpt_computes_another_gelu(model_19072, tmp_path, capsys):
    _, weights = make_theirs()
    torch.save(nanogpt(weights), tmp_path / "ckpt.pt")
    GPT.load(tmp_path / "ckpt.pt")
    streams = capsys.readouterr()
    assert "computes the exact GELU" in streams.err and streams.out == ""
    early = nanogpt(weights)
    del early["model_args"]["bias"]  # of early 2023, when its GELU was GPT-2's
    torch.save(early, tmp_path / "ckpt.pt")
    GPT.load(tmp_path / "ckpt.pt")
    GPT.load(model_19072)
    assert capsys.readouterr().err == ""


def test_a_hub_s_name_says_how_to_have_it():
    with pytest.raises(CheckpointError, match="hf download distilbert/distilgpt2 --local-dir FOLDER"):
        GPT.load("distilbert/distilgpt2")


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    torch.save(nanogpt(make_theirs()[1], n_embd=16), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"the weights in .*ckpt.pt are not those of its configuration"):
        GPT.load(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("size, matrix", [("vocab_size", "wte"), ("block_size", "wpe")])
def test_an_embedding_of_another_shape_is_refused_before_the_model_is_built(size, matrix, tmp_path, monkeypatch):
    torch.save(nanogpt(make_theirs()[1], **{size: 10**6}), tmp_path / "ckpt.pt")
    monkeypatch.setattr(GPT, "__init__", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(UserError, match=rf"transformer\.{matrix}\.weight is not of shape \(1000000, 8\)"):
        GPT.load(tmp_path / "ckpt.pt")


def train(arguments) -> None:
    """Run train_gpt2.py in this process."""
    train_gpt2.main(train_gpt2.parse_args(list(map(str, arguments))))


@pytest.fixture
def mains(monkeypatch):
    """The commands, to be called with their arguments in this process."""
    monkeypatch.setattr(signal, "signal", lambda *_, **__: None)  # hellaswag.py sets one for its process
    return {"generate": generate.main, "export_hf": export_hf.main, "hellaswag": hellaswag.main, "train_gpt2": train}


@needs(*ENCODING)
def test_all_commands_take_them(shard_folder, mains, tmp_path, capsys):
    theirs, weights = make_theirs(biases=False)
    torch.save(nanogpt(weights, biases=False), tmp_path / "ckpt.pt")
    (tmp_path / "log.jsonl").write_text('{"kind": "run", "config": {}}\n')  # not of this checkpoint
    path = str(tmp_path / "ckpt.pt")
    mains["export_hf"]([path, str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ckpt.pt, a checkpoint of nanoGPT." in card and "No log of its training" in card
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    idx = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(idx).logits, theirs(idx).logits[..., :50257], atol=1e-4, rtol=0)
    capsys.readouterr()
    mains["generate"](["--model", path, "--device", "cpu", "--max_new_tokens", "2"])
    assert capsys.readouterr().out.startswith("Hello, I'm")
    mains["hellaswag"](["--model", path, "--device", "cpu", "--limit", "2", "--data", str(OURS)])
    assert "acc_norm" in capsys.readouterr().out
    train(flags(data=shard_folder, init_from=path, out_dir=tmp_path / "log", max_steps=2))
    assert torch.load(tmp_path / "log" / "model_000002.pt")["model_config"]["n_embd"] == 8


@pytest.mark.parametrize("command, arguments", [
    ("generate", ["--model", "ckpt.pt"]), ("export_hf", ["ckpt.pt", "out"]),
    ("hellaswag", ["--model", "ckpt.pt", "--data", str(OURS)]),
    ("train_gpt2", ["--init_from", "ckpt.pt", "--out_dir", "log", "--data", "data"])])
def test_a_character_level_nanogpt_is_loaded_but_refused_where_gpt2_s_tokens_are_needed(
        command, arguments, mains, shard_folder, tmp_path, monkeypatch):
    theirs, weights = make_theirs(vocab_size=65)
    torch.save(nanogpt(weights, vocab_size=65), tmp_path / "ckpt.pt")
    same_logits(tmp_path / "ckpt.pt", theirs)
    monkeypatch.chdir(tmp_path)
    assert "ckpt.pt is nanoGPT's with 65 tokens, which are not GPT-2's" in error_of(mains[command], arguments)


@pytest.mark.parametrize("names, message", [
    (["model_00250.pt", "model_19072.pt"], r"its model_19072.pt seems .* build-nanogpt: name \S+/model_19072.pt"),
    (["ckpt.pt"], r"seems to be a checkpoint of nanoGPT: name \S+/ckpt.pt")])
def test_folders_of_other_programs_name_the_file_to_type(names, message, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        GPT.load(tmp_path)


@pytest.mark.parametrize("files, message", [
    (["hparams.json", "model-1000.index", "checkpoint", "encoder.json"], "TensorFlow checkpoint.*gpt-2-simple"),
    (["model.ckpt.index", "model.ckpt.meta"], "TensorFlow checkpoint"),
    (["adapter_config.json", "adapter_model.safetensors"], r"adapter \(LoRA\).*merge_and_unload"),
    ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
    (["pytorch_model.bin"], "config.json is missing"),
    (["model.safetensors"], "config.json is missing"),
    (["train.bin", "val.bin"], "holds neither a whole checkpoint nor a transformers model$"),
    (["llama.gguf"], "there is llama.gguf: name that file"),
    (["checkpoint-500/config.json", "checkpoint-1000/config.json"], "did you mean .*checkpoint-1000"),
    (["run1/hparams.json", "run1/model-1000.index"], "in run1, it seems to be a TensorFlow checkpoint"),
    (["step_10/mp_rank_00_model_states.pt"], "in step_10, there is mp_rank_00_model_states.pt: name that file"),
    (["config.json", "pytorch_model.bin"], "pytorch_model.bin, which can run code"),
    (["config.json", "tf_model.h5"], "there is tf_model.h5 but no model.safetensors"),
    (["config.json", "model.fp16.safetensors"], "there is model.fp16.safetensors but no model.safetensors"),
])
def test_folders_that_cannot_be_read_say_what_they_seem_to_be(files, message, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shape = '"vocab_size": 9, "n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 4'
        (tmp_path / name).write_text("{" + shape + "}" if name.endswith("config.json") else "x")
    with pytest.raises((UserError, CheckpointError), match=message) as error:
        GPT.load(tmp_path)
    assert "\n" not in str(error.value)


def write_zip(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")


class Whole(torch.nn.Linear):
    """A module that is saved whole."""


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"

OTHERS = {  # name, what makes the file, and what the message must say
    "llm.c": ("model.bin", struct.pack("<256i", 20240326, 3, *[0] * 254), "llm.c"),
    "gguf": ("model.gguf", b"GGUF" + bytes(100), "GGUF"),
    "safetensors": ("model.safetensors", struct.pack("<q", 2) + b"{}", "name the folder"),
    "hdf5": ("tf_model.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "TensorFlow"),
    "flax": ("flax_model.msgpack", b"\x81", "Flax"),
    "tensorflow": ("model.ckpt.index", b"x", "TensorFlow"),
    "pickle": ("model.pkl", b"\x80\x04K\x01.", "a pickle"),
    "whole module": ("model.pt", lambda path: torch.save(Whole(2, 2), path), "whole object, .*Whole, not a state dict"),
    "state dict": ("model.pt", lambda path: torch.save(make_theirs()[1], path), "without its shape.*model_args"),
    "hub's bin": ("pytorch_model.bin", lambda path: torch.save(make_theirs()[1], path), "old form.*save_pretrained"),
    "optimizer": ("optimizer.pt", lambda path: torch.save({"state": {}, "param_groups": []}, path), "of an optimizer"),
    "lightning": ("last.ckpt", lambda path: torch.save(
        {"pytorch-lightning_version": "2.5", "state_dict": make_theirs()[1], "hyper": Whole(1, 1)}, path), "Lightning"),
    "another": ("llama.pth", lambda path: torch.save({"tok_embeddings.weight": torch.ones(2)}, path),
                "another architecture: there is 'tok_embeddings.weight'"),
    "legacy": ("old.pt", lambda path: torch.save(make_theirs()[1], path, _use_new_zipfile_serialization=False),
               "PyTorch before 1.6"),
    "torchscript": ("script.pt", lambda path: write_zip(path, "a/constants.pkl"), "TorchScript"),
    "zip": ("model.zip", lambda path: write_zip(path, "a/model.bin"), "unpack it"),
    "empty": ("model.pt", b"", "seems to be empty.* fetch it again"),
    "zeros": ("model.pt", bytes(5000), "seems to be empty.* fetch it again"),
    "note of Git LFS": ("model.pt", LFS, "git lfs pull"),
    "page": ("model.pt", b"<!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
    "text": ("model.pt", b"First Citizen:\nBefore we proceed\n", "text, not a model"),
    "args": ("training_args.bin", lambda path: torch.save(Whole(1, 1), path), "whole object"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_programs_say_what_they_seem_to_be(kind, tmp_path):
    name, write, message = OTHERS[kind]
    (tmp_path / name).write_bytes(write) if isinstance(write, bytes) else write(tmp_path / name)
    for load in (GPT.load, models.with_gpt2_tokens):
        with pytest.raises((UserError, CheckpointError), match=message) as error:
            load(tmp_path / name)
        text = str(error.value)
        assert name in text and "\n" not in text and "\x1b" not in text and "weights_only" not in text


@pytest.mark.parametrize("spoil, message", [
    (lambda data: LFS, "model.safetensors: it is not there yet.* git lfs pull"),
    (lambda data: data[:-10], "model.safetensors is not whole: .* fetch or copy it again"),
    (lambda data: b"", "model.safetensors is not whole: .* fetch or copy it again")])
def test_tensors_that_are_not_whole_are_named_with_what_to_do(spoil, message, tmp_path):
    path = tmp_path / "model.safetensors"
    make_theirs()[0].save_pretrained(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        GPT.load(tmp_path)


def test_a_damaged_file_is_not_taken_for_another_s(tmp_path):
    torch.save(nanogpt(make_theirs()[1]), tmp_path / "ckpt.pt")
    data = bytearray((tmp_path / "ckpt.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        GPT.load(tmp_path / "ckpt.pt")


def test_branching_from_one_says_where_it_can_be_named(model_19072, shard_folder, tmp_path):
    torch.save(nanogpt(make_theirs()[1]), tmp_path / "ckpt.pt")
    for path in (tmp_path / "ckpt.pt", model_19072):
        line = error_of(train, flags(data=shard_folder, branch_from=path, out_dir=tmp_path / "out"))
        assert "can be named by --init_from and --model" in line
        assert "\x1b" not in line and "weights_only" not in line


# ------------------------------------------------------------------------------------------ the state of the optimizers

def steps(model, kind):
    """An optimizer of the model after one step."""
    torch.manual_seed(0)
    optimizer = kind([p for p in model.parameters() if p.dim() == 2])
    model(torch.zeros(1, 4).long(), torch.zeros(1, 4).long()).backward()
    optimizer.step()
    return optimizer


SPOILS = {
    "shape": lambda o: o["state"][0].update({next(iter(o["state"][0].keys() - {"step"})): torch.zeros(3)}),
    "not a tensor": lambda o: o["state"][0].update({next(iter(o["state"][0].keys() - {"step"})): "x"}),
    "integers": lambda o: o["state"][0].update({next(iter(o["state"][0].keys() - {"step"})): torch.zeros(9).long()}),
    "a tensor missing": lambda o: o["state"].pop(1),
    "a moment missing": lambda o: o["state"][0].popitem(),
    "another tensor": lambda o: o["state"].update({99: o["state"].pop(1)}),
    "no groups": lambda o: o.update(param_groups=[]),
    "no key groups": lambda o: o.pop("param_groups"),
    "no state": lambda o: o.pop("state"),
    "a group of another size": lambda o: o["param_groups"][0]["params"].pop(),
    "a text": lambda o: o["param_groups"][0].update(lr="fast"),
    "no weight decay": lambda o: o["param_groups"][0].pop("weight_decay"),
    "nan": lambda o: o["param_groups"][0].update(lr=float("nan")),
    "a step before the first": lambda o: o["state"][0].update(step=torch.tensor(-1.0), momentum_buffer=None),
    "a rate of another world": lambda o: o["param_groups"][0].update(lr=10**400),
    "groups of numbers": lambda o: o.update(param_groups=[1]),
    "the same twice": lambda o: o["param_groups"][0].update(params=[0] * len(o["param_groups"][0]["params"])),
}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
@pytest.mark.parametrize("spoil", SPOILS)
def test_an_edited_state_of_the_optimizer_is_refused_by_name(spoil, kind):
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    optimizer, scaler = steps(model, kind), torch.amp.GradScaler("cpu", enabled=False)

    def state():
        return {"path": "log/model_000001.pt", "optimizers": [optimizer.state_dict()], "scaler": {}}
    checkpoint.restore(state(), [optimizer], scaler, torch.device("cpu"))  # what is right is taken
    fresh = kind([p for p in model.parameters() if p.dim() == 2])
    checkpoint.restore(state() | {"optimizers": [fresh.state_dict()]}, [optimizer], scaler, torch.device("cpu"))
    optimizer = steps(model, kind)
    wrong = state()
    SPOILS[spoil](wrong["optimizers"][0])
    with pytest.raises(CheckpointError, match=r"the optimizers in log/model_000001.pt is not that of this model"):
        checkpoint.restore(wrong, [optimizer], scaler, torch.device("cpu"))


@pytest.mark.parametrize("optimizers", [[], [{}], [1], [None, None], [[]]])
def test_optimizers_of_another_number_or_kind_are_refused(optimizers):
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(CheckpointError, match="the state of the optimizers"):
        checkpoint.restore({"path": "x.pt", "optimizers": optimizers, "scaler": {}}, [steps(model, torch.optim.AdamW)],
                           torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))


def test_a_file_whose_list_of_contents_is_damaged_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("café/data.pkl", b"")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
        models.find(path)
