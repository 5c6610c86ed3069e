"""Random changes of other programs' models: refused, or the logits and ids that transformers computes from the same."""
import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import hypothesis.strategies as st
import torch

from plumbing.model_tokenizer import tokenizer_of
from train_gpt2 import GPT

SHAPE = {"vocab_size": 300, "n_positions": 16, "n_layer": 1, "n_head": 2, "n_embd": 8,
         "bos_token_id": 0, "eos_token_id": 0}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
PROMPTS = ("el perro <|user|> y el ni\u00f1o", " two\n\n  three", "Hallo<|endoftext|>x \u4f60\u597d",
           "plainword and plainwords", "a")
VALUES = st.sampled_from([
    None, True, False, 0, 1, 2, 4, 8, 16, 32, 299, 300, 301, -1, 1e-6, 0.5, 10**30, float("nan"), "", "2", "gelu",
    "relu", "gelu_new", "gelu_fast", "silu", "<|user|>", "<|endoftext|>", "plainword", "float16", "GPT2Tokenizer",
    "LlamaTokenizer", [], {}, ["<|user|>"], [0, 257], {"content": "<|user|>", "special": True}, ["GPT2Model"],
    ["GPT2ForSequenceClassification"]])
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
AROUND = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                                                   {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
          "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}
PARTS = st.sampled_from([
    BYTE_LEVEL, {"type": "Lowercase"}, {"type": "NFC"}, {"type": "Whitespace"}, AROUND, {"type": "nonsense"},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "processors": [], "decoders": []},
    {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}])
KEYS = {
    "config.json": (*SHAPE, "activation_function", "layer_norm_epsilon", "scale_attn_weights", "n_inner", "n_ctx",
                    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings", "model_type",
                    "architectures", "hidden_size", "num_attention_heads", "max_position_embeddings", "eos_token_id",
                    "add_cross_attention", "tokenizer_class", "torch_dtype", "rope_scaling", "pruned_heads",
                    "quantization_config", "num_hidden_layers", "is_encoder_decoder", "attention_bias", "resid_pdrop"),
    "tokenizer_config.json": (
        "add_bos_token", "add_eos_token", "add_prefix_space", "bos_token", "eos_token", "pad_token", "unk_token",
        "additional_special_tokens", "extra_special_tokens", "tokenizer_class", "added_tokens_decoder",
        "do_lower_case", "clean_up_tokenization_spaces", "auto_map", "split_special_tokens", "model_max_length",
        "padding_side", "truncation_side"),
    "special_tokens_map.json": ("bos_token", "eos_token", "unk_token", "additional_special_tokens", "mask_token"),
    "added_tokens.json": ("plainword", "<|user|>", "ni\u00f1o", "<|endoftext|>"),
    "generation_config.json": ("eos_token_id", "bos_token_id", "nonsense"),
    "tokenizer.json": ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding",
                       "added_tokens", "version", "model.type", "model.unk_token", "model.merges", "model.vocab",
                       "model.byte_fallback", "model.ignore_merges", "model.continuing_subword_prefix",
                       "model.end_of_word_suffix", "model.fuse_unk", "added_tokens.0.id", "added_tokens.1.content",
                       "added_tokens.1.id", "added_tokens.1.special", "added_tokens.1.lstrip",
                       "added_tokens.1.single_word", "added_tokens.1.normalized"),
}
CHANGES = st.one_of([st.tuples(
    st.just(file), st.sampled_from(keys), st.one_of(VALUES, PARTS) if file == "tokenizer.json" else VALUES)
    for file, keys in KEYS.items()])
EDITS = ("drop", "rename", "transpose", "half", "int", "flat", "cut", "twice", "mask", "head", "other head")
TENSORS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(EDITS)), max_size=1)


def fuzz_models(fuzz, test) -> None:
    """Run the random tests of this module; `test` makes one of a function, and `fuzz` is the Fuzz that they share."""
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    transformers_folders(fuzz, test)
    checkpoints_of_others(fuzz, test)


def change(values, key: str, value) -> None:
    """Set the value under a key such as "model.vocab", or drop it if the value is "" and it is there."""
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change has taken it
        for part in path:
            values = values[part]
        values[last] = value
        if value == "":
            del values[last]


def change_tensors(weights: dict, edits: list) -> dict:
    """Return tensors with some of them changed."""
    for number, edit in edits:
        name = sorted(weights)[number % len(weights)]
        weight = weights[name]
        changed = {"transpose": weight.t() if weight.dim() == 2 else weight, "half": weight.half(), "int": weight.int(),
                   "flat": weight.flatten(), "cut": weight[:-1]}.get(edit, weight).contiguous()
        weights = {**weights, name: changed}
        if edit in ("drop", "rename"):
            del weights[name]
        wte = next((weight for key, weight in weights.items() if key.endswith("wte.weight")), changed)
        more = {"rename": {f"x.{name}": changed}, "twice": {f"transformer.{name}": changed.clone()},
                "mask": {name.rpartition(".")[0] + ".attn.bias": torch.ones(1, 1, 4, 4)},
                "head": {"lm_head.weight": wte.clone()}, "other head": {"lm_head.weight": wte + 1}}
        weights |= more.get(edit, {})
    return weights


def write_folder(folder: Path):
    """Write a model with a tokenizer of its own as transformers does; return its tensors."""
    import tokenizers
    import transformers
    from safetensors.torch import load_file

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=299, special_tokens=["<|endoftext|>", "<|user|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["el perro y el ni\u00f1o comen en la casa de la abuela " * 50], trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>",
                                                  eos_token="<|endoftext|>")
    theirs.add_tokens(["plainword"])
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    model.save_pretrained(folder)
    theirs.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def transformers_folders(fuzz, test) -> None:
    """A folder with changed files gives transformers' logits and ids, or is refused."""
    from safetensors.torch import save_file

    good = fuzz.home / "inputs" / "theirs"
    with silence():
        weights = write_folder(good)

    @test(changes=st.lists(CHANGES, max_size=2), tensors=TENSORS,
          gone=st.sampled_from([None, None, None, "config.json", "tokenizer.json", "tokenizer_config.json"]))
    def folder(changes, tensors, gone):
        folder = fuzz.fresh("theirs")
        shutil.copytree(good, folder, dirs_exist_ok=True)
        for file, key, value in changes:
            values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
            change(values, key, value)
            (folder / file).write_text(json.dumps(values))
        if tensors:
            save_file(change_tensors(weights, tensors), folder / "model.safetensors", metadata={"format": "pt"})
        if gone:
            (folder / gone).unlink()
        case = f"{changes}, {tensors}, without {gone}"
        model = fuzz.call("transformers folder", GPT.load, folder)
        ids = fuzz.call("its tokenizer", lambda: [tokenizer_of(folder).encode(text) for text in PROMPTS])
        for compare, found in ((compare_logits, model), (compare_ids, ids)):
            if found is not None:
                compare(folder, found, case)

    folder()


@contextlib.contextmanager
def silence():
    """A context in which what a library says or warns of is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def compare_logits(folder: Path, model, case: str) -> None:
    """Assert that the logits are transformers', if it reads the folder."""
    import transformers

    try:
        with silence():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception:  # whatever it may be: then there is nothing to compare
        return
    assert_same_logits(model, theirs, case)


def assert_same_logits(model, theirs, case: str) -> None:
    """Assert that two models compute the same."""
    length = min(model.config.block_size, theirs.config.n_positions)
    idx = torch.randint(0, min(model.config.vocab_size, theirs.config.vocab_size), (2, length),
                        generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, expected = model.eval().float()(idx), theirs(idx).logits
    assert ours.shape == expected.shape and torch.allclose(ours, expected, atol=1e-4), f"other logits: {case}"


def compare_ids(folder: Path, ids: list[list[int]], case: str) -> None:
    """Assert that the ids are transformers', but for what it puts behind a text, if it reads the tokenizer."""
    import transformers

    try:
        with silence():
            theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            expected, special = [theirs(text)["input_ids"] for text in PROMPTS], {*theirs.all_special_ids}
    except Exception:  # as above
        return
    for text, ours, whole in zip(PROMPTS, ids, expected):
        behind = whole[len(ours):]
        assert whole[:len(ours)] == ours and {*behind} <= special, (
            f"{text!r} is {ours}, not {whole}: {case}")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of nanoGPT's kind
# ---------------------------------------------------------------------------------------------------------------------

def checkpoints_of_others(fuzz, test) -> None:
    """A checkpoint of nanoGPT's kind with changed settings, tensors and bytes gives transformers' logits, or none."""
    import transformers

    torch.manual_seed(0)
    good = dict(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE)).named_parameters())
    good = {name: torch.randn_like(p) * 0.4 for name, p in good.items()}
    good = {name: (p.t() if name.endswith(CONV1D) else p).contiguous() for name, p in good.items()}
    shape = {"block_size": 16, "bias": True, "dropout": 0.0,
             **{key: SHAPE[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}}

    @test(changes=st.dictionaries(st.sampled_from(sorted(shape)), VALUES, max_size=1), tensors=TENSORS,
          prefix=st.sampled_from(["", "_orig_mod.", "module.", "x."]), bias=st.booleans(),
          where=st.sampled_from(["model_args", "model_args", "config", "neither"]), step=VALUES,
          damage=st.one_of(st.none(), st.none(), st.tuples(st.integers(0, 30_000), st.binary(max_size=3))))
    def checkpoint(changes, tensors, prefix, bias, where, step, damage):
        weights = {prefix + name: p for name, p in good.items() if bias or not name.endswith(".bias")}
        weights, settings = change_tensors(weights, tensors), {**shape, "bias": bias, **changes}
        path = fuzz.fresh("checkpoint") / "ckpt.pt"
        torch.save({"model": weights, where: settings, "iter_num": step, "step": step}, path)
        if damage:
            data, (place, junk) = path.read_bytes(), damage
            path.write_bytes(data[:place] + junk + data[place + len(junk):] * bool(junk))
        model = fuzz.call("checkpoint of nanoGPT's kind", GPT.load, path)
        case = f"{changes}, {tensors}, {prefix!r}, bias {bias}, {where}, {damage}"
        is_whole = not (changes or tensors or damage) and prefix != "x."
        if is_whole and (where == "model_args" or (where == "config" and bias)):
            assert model is not None, f"refused: {case}"
        if model is not None and not damage:
            assert_same_logits(model, rebuild(settings, weights), case)

    checkpoint()


def rebuild(settings: dict, weights: dict):
    """Build transformers' GPT-2 from what a checkpoint of nanoGPT's kind holds; raises if that is no model."""
    import transformers

    shape = {key: int(settings[key]) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **shape, n_positions=int(settings["block_size"]))).eval()
    found = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): p.float() for name, p in weights.items()}
    found = {name: p.t() if name.endswith(CONV1D) else p for name, p in found.items()
             if not name.endswith(".attn.bias")}
    found["lm_head.weight"] = found["transformer.wte.weight"]
    if not settings["bias"]:
        found = {name: torch.zeros_like(p) for name, p in theirs.state_dict().items() if name.endswith(".bias")} | found
    theirs.load_state_dict(found)
    return theirs
