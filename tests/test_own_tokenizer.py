"""What a transformers folder brings is used or refused by name: its tokenizer, its added tokens, its configuration.

    pytest tests/test_own_tokenizer.py
"""
import functools
import json
import shutil
import signal

import pytest
import torch
from helpers import ENCODING, ROOT, error_of, flags, needs, random_gpt2, slow, write_shards
from safetensors.torch import load_file, save_file

import export_hf
import generate
import hellaswag
import train_gpt2
from generate import GenerateConfig, continuations
from plumbing import model_tokenizer, models, transformers_format
from plumbing.cli import UserError
from plumbing.files import CheckpointError, DataError
from plumbing.model_tokenizer import tokenizer_of
from plumbing.sampling import choose_token, stream_tokens
from plumbing.tokenizer import vocabulary_files
from train_gpt2 import GPT, GPTConfig

pytestmark = needs(*ENCODING, "transformers", "tokenizers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SMALL = dict(n_layer=1, n_head=2, n_embd=16, n_positions=32)
TEXTS = ["El perro come, niño.", " two\n\n  three", "naïve 你好 🙂👩‍🚀", "<|endoftext|>x", "Hallo <|user|> da", "", "a"]
EXAMPLES = str(ROOT / "tests" / "hellaswag_examples.jsonl")


def train(arguments) -> float:
    """Run train_gpt2.py in this process."""
    return train_gpt2.main(train_gpt2.parse_args(arguments))


def train_bpe(size=400, **settings):
    """A byte-level BPE of another language, as `tokenizers` trains it, in transformers' wrapper."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>", "<|user|>"],
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["el perro y el niño comen en la casa de la abuela " * 50], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **{
        "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", **settings})


def gpt2_tokenizer(folder):
    """transformers' own GPT-2 tokenizer, made from OpenAI's files."""
    files = vocabulary_files()
    folder.mkdir()
    shutil.copyfile(files["encoder.json"], folder / "vocab.json")
    shutil.copyfile(files["vocab.bpe"], folder / "merges.txt")
    return transformers.GPT2Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that makes a model with a tokenizer of its own, once: (folder, transformers' model, its tokenizer)."""
    @functools.cache
    def make(which: str):
        folder = tmp_path_factory.mktemp(which)
        if which == "spanish":
            tokenizer = train_bpe()
            ends = dict(bos_token_id=0, eos_token_id=0)
        else:
            tokenizer, ends = gpt2_tokenizer(folder / "gpt2"), {}
            tokenizer.add_tokens(["<|user|>", "<|bot|>"], special_tokens=True)
            tokenizer.add_tokens(["plainword"])
        theirs = random_gpt2(folder / "model", std=0.4, **SMALL, vocab_size=len(tokenizer), **ends)
        tokenizer.save_pretrained(folder / "model")
        return folder / "model", theirs, tokenizer

    return make


def copied(made, folder):
    """What has been made, in a folder of the test's own."""
    return shutil.copytree(made[0], folder), *made[1:]


@pytest.fixture
def spanish(made, tmp_path):
    """(a folder with a model and a tokenizer of its own, transformers' model of it, and its tokenizer)."""
    return copied(made("spanish"), tmp_path / "es")


@pytest.fixture
def chat(made, tmp_path):
    """The same for GPT-2 with three tokens added: 50,260 rows."""
    return copied(made("chat"), tmp_path / "chat")


@pytest.mark.parametrize("which", ["spanish", "chat"])
def test_prompts_are_encoded_and_text_is_decoded_as_transformers_does(which, request):
    folder, *_ = request.getfixturevalue(which)
    loaded, ours = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_of(folder)
    for text in [*TEXTS, "plainword and<|bot|>plainwords"]:
        ids = ours.encode(text)
        assert ids == loaded(text)["input_ids"], text
        decoder = ours.decoder(ids[:1])
        pieces = [decoder.step(token) for token in ids[1:]] + [decoder.end()]
        assert "".join(pieces) == loaded.decode(ids)[len(loaded.decode(ids[:1])):] or "\ufffd" in loaded.decode(ids[:1])
    assert ours.size == len(loaded) and ours.ends == {loaded.eos_token_id} and not ours.has_gpt2_tokens


@pytest.mark.parametrize("which", ["spanish", "chat"])
def test_the_text_is_transformers_greedy_text(which, request, capsys):
    folder, theirs, tokenizer = request.getfixturevalue(which)
    prompt = "el perro <|user|> plainword"
    idx = torch.tensor([tokenizer(prompt)["input_ids"]])
    ids = theirs.generate(idx, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
                          attention_mask=torch.ones_like(idx))[0, idx.size(1):].tolist()
    assert len(set(ids)) > 1 and tokenizer.eos_token_id not in ids
    generate.main(["--model", str(folder), "--device", "cpu", "--dtype", "float32", "--temperature", "0",
                   "--prompt", prompt, "--max_new_tokens", "12"])
    said = capsys.readouterr()
    assert said.out == prompt + tokenizer.decode(ids) + "\n"
    assert f"its own tokenizer of {len(tokenizer):,} tokens" in said.err


def test_a_text_ends_at_the_tokenizer_s_own_token_and_an_empty_prompt_begins_with_it(spanish, monkeypatch):
    folder, _, tokenizer = spanish
    model, ours, read = GPT.load(folder), tokenizer_of(folder), []
    script = torch.tensor([[*tokenizer("perro")["input_ids"], 0, 7]])
    monkeypatch.setattr(generate, "stream_tokens", lambda *given, **__: (
        read.append(given) or iter(script.t().unsqueeze(2))))
    config = GenerateConfig(max_new_tokens=script.size(1))
    text = "".join(piece for _, piece, _ in continuations(model, "", config, torch.Generator(), ours))
    assert text == "perro"
    assert read[0][1].tolist() == [[0]] and read[0][5] == len(tokenizer)


def test_no_token_that_the_tokenizer_does_not_know_is_ever_drawn():
    model = GPT(GPTConfig(block_size=8, vocab_size=500, n_layer=1, n_head=1, n_embd=8))
    choose = functools.partial(choose_token, temperature=5.0, top_k=None)
    drawn = torch.cat(list(stream_tokens(model, torch.zeros(1, 1).long(), 30, choose, 20, 400)))
    assert 300 < drawn.max() < 400


@pytest.mark.parametrize("which", ["spanish", "chat"])
def test_an_export_keeps_the_tokenizer_and_all_rows(which, request, tmp_path):
    folder, theirs, tokenizer = request.getfixturevalue(which)
    export_hf.main([str(folder), str(tmp_path / "out")])
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    idx = torch.tensor([tokenizer("el <|user|> perro")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(idx).logits, theirs(idx).logits)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"its own tokenizer of {len(tokenizer):,} tokens" in card and "GPT-2's tokenizer" not in card


def test_a_difference_in_an_added_row_alone_is_found(chat, tmp_path, monkeypatch):
    write = transformers_format.write_transformers

    def spoilt(folder, shape, weights, *more, **options):
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"].clone()
        weights["transformer.wte.weight"][50258] = 0
        write(folder, shape, weights, *more, **options)
    monkeypatch.setattr(transformers_format, "write_transformers", spoilt)
    with pytest.raises(UserError, match="other logits"):
        export_hf.main([str(chat[0]), str(tmp_path / "out")])


@pytest.mark.parametrize("which", ["spanish", "chat"])
@pytest.mark.parametrize("main, arguments", [
    (hellaswag.main, ["--data", EXAMPLES, "--model"]),
    (train, ["--max_steps", "1", "--out_dir", "log", "--data", "data", "--init_from"]),
    (train, ["--eval_only", "--out_dir", "log", "--data", "data", "--init_from"])])
def test_where_gpt2_s_tokens_are_needed_it_is_refused(which, main, arguments, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_, **__: None)  # hellaswag.py sets one for its process
    folder, _, tokenizer = request.getfixturevalue(which)
    write_shards(tmp_path / "data", high=400)
    line = error_of(main, [*arguments, str(folder)])
    assert f"has its own tokenizer of {len(tokenizer):,} tokens, but this needs GPT-2's" in line
    assert not list(tmp_path.glob("log/*.pt"))


# --------------------------------------------------------------------------------------------------- GPT-2's own, saved

def as_fast(folder, tokenizer):
    tokenizer.save_pretrained(folder)


def as_hub(folder, tokenizer):
    """tokenizer.json as it is on the hub, beside vocab.json and merges.txt: merges are strings."""
    tokenizer.save_pretrained(folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]
    description["added_tokens"][0]["normalized"] = True
    description["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    del description["pre_tokenizer"]["use_regex"]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    as_slow(folder, tokenizer)


def as_slow(folder, tokenizer=None):
    files = vocabulary_files()
    (folder / "vocab.json").write_text(json.dumps(json.loads(files["encoder.json"].read_text()), indent=1))
    shutil.copyfile(files["vocab.bpe"], folder / "merges.txt")


def with_pad(folder, tokenizer):
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("save", [slow(as_fast), as_hub, slow(as_slow), slow(with_pad)])
def test_gpt2_s_own_tokenizer_counts_as_such_in_any_form(save, tmp_path):
    tokenizer = gpt2_tokenizer(tmp_path / "gpt2")
    random_gpt2(tmp_path / "model", **SMALL)
    save(tmp_path / "model", tokenizer)
    ours = tokenizer_of(tmp_path / "model")
    assert ours.name == "GPT-2's tokenizer" and ours.has_gpt2_tokens
    models.with_gpt2_tokens(tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_a_padding_token_without_a_row_leaves_the_model_s_tokens_gpt2_s(tmp_path):
    """The usual fine-tuning: [PAD] is added to the tokenizer, and the model has no row for it."""
    tokenizer = gpt2_tokenizer(tmp_path / "gpt2")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    random_gpt2(tmp_path / "model", **SMALL)
    tokenizer.save_pretrained(tmp_path / "model")
    models.with_gpt2_tokens(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--device", "cpu", "--max_new_tokens", "2", "--prompt", "x[PAD]"]
    assert "the prompt has the token 50257, but the model only 50257 rows" in error_of(generate.main, arguments)


def change(folder, name, **changes):
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


@pytest.mark.parametrize("spoil", [
    lambda folder: change(folder, "tokenizer_config.json", add_prefix_space=True),
    *map(slow, (
        lambda folder: change(folder, "added_tokens.json", **{"<|user|>": 50257}),
        lambda folder: change(folder, "tokenizer_config.json", add_bos_token=True),
        lambda folder: change(folder, "tokenizer_config.json", added_tokens_decoder={
            "50257": {"content": "<|user|>", "special": True, "lstrip": False, "rstrip": False, "single_word": False,
                      "normalized": False}}),
        lambda folder: change(folder, "tokenizer_config.json", pad_token="<pad>", sep_token="<sep>"),
        lambda folder: change(folder, "special_tokens_map.json", pad_token={"content": "<pad>"}))),
])
def test_what_stands_beside_gpt2_s_vocabulary_counts(spoil, tmp_path):
    random_gpt2(tmp_path / "model", **SMALL, vocab_size=50304)
    as_slow(tmp_path / "model")
    assert tokenizer_of(tmp_path / "model").has_gpt2_tokens
    spoil(tmp_path / "model")
    ours, theirs = tokenizer_of(tmp_path / "model"), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert not ours.has_gpt2_tokens
    for text in [*TEXTS[:-2], "a", "<pad>x<sep>y <|user|>"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("which", ["spanish", "chat"])
def test_a_template_of_tokenizer_json_counts_and_add_bos_token_beside_it_does_not(which, request):
    folder, *_ = request.getfixturevalue(which)
    change(folder, "tokenizer_config.json", add_bos_token=True)
    loaded, ours = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_of(folder)
    for text in TEXTS:
        assert ours.encode(text) == loaded(text)["input_ids"], text


def test_a_template_in_front_is_kept_and_what_would_end_the_text_is_not(tmp_path):
    tokenizer = train_bpe()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|user|> $A <|endoftext|>", special_tokens=[("<|user|>", 1), ("<|endoftext|>", 0)])
    random_gpt2(tmp_path / "es", **SMALL, vocab_size=len(tokenizer))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.save_pretrained(tmp_path / "es")
    plain = tokenizer("el perro come en la casa", add_special_tokens=False)["input_ids"]
    assert len(plain) > 5 and tokenizer_of(tmp_path / "es").encode("el perro come en la casa") == [1, *plain]


@pytest.mark.parametrize("processor, expected", [
    (tokenizers.processors.RobertaProcessing(("<|endoftext|>", 0), ("<|user|>", 1)), [1]),
    (tokenizers.processors.BertProcessing(("<|endoftext|>", 0), ("<|user|>", 1)), [1]),
    (tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(), tokenizers.processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", 1)])]), [1]),
    (tokenizers.processors.Sequence([tokenizers.processors.ByteLevel()]), []),
])
def test_what_stands_around_a_text_may_be_said_in_any_way(processor, expected, tmp_path):
    tokenizer = train_bpe()
    tokenizer.backend_tokenizer.post_processor = processor
    random_gpt2(tmp_path / "es", **SMALL, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "es")
    plain = tokenizer("el perro", add_special_tokens=False)["input_ids"]
    assert tokenizer_of(tmp_path / "es").encode("el perro") == [*expected, *plain]


def test_gpt2_s_vocabulary_without_its_way_to_split_words_is_another_tokenizer(tmp_path):
    tokenizer = gpt2_tokenizer(tmp_path / "gpt2")
    random_gpt2(tmp_path / "model", **SMALL)
    tokenizer.save_pretrained(tmp_path / "model")
    change(tmp_path / "model", "tokenizer.json", pre_tokenizer=None)
    assert not tokenizer_of(tmp_path / "model").has_gpt2_tokens


def test_an_ordinary_word_ends_no_text_though_the_configuration_names_it(tmp_path):
    tokenizer = train_bpe()
    random_gpt2(tmp_path / "es", **SMALL, vocab_size=len(tokenizer), eos_token_id=300)
    tokenizer.save_pretrained(tmp_path / "es")
    assert tokenizer_of(tmp_path / "es").ends == {0}
    change(tmp_path / "es", "generation_config.json", eos_token_id=[0, 1])  # <|user|>, a special token
    assert tokenizer_of(tmp_path / "es").ends == {0, 1}


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: (folder / "vocab.txt").write_text("[UNK]\n"), r"has a tokenizer \(vocab.txt\).* save_pretrained"),
    (lambda folder: change(folder, "config.json", tokenizer_class="BertTokenizer"), "has a BertTokenizer instead"),
    (lambda folder: change(folder, "tokenizer_config.json", tokenizer_class="XGLMTokenizer"), "XGLMTokenizer instead"),
    (lambda folder: (folder / "spiece.model").write_bytes(b"x"), r"has a tokenizer \(spiece.model\)"),
    (lambda folder: (folder / "vocab.json").write_text("{}"), "only one of vocab.json and merges.txt"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer in .* cannot be used"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer in .* cannot be used"),
    (lambda folder: (folder / "tokenizer.json").write_text("[]"), "the tokenizer in .* cannot be used"),
    (lambda folder: change(folder, "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}),
     "the tokenizer in .* cannot be used"),
    (lambda folder: (folder / "tokenizer.json").symlink_to("/etc/passwd"), "is a link to another folder"),
    (lambda folder: change(folder, "added_tokens.json", **{"<|user|>": 50257}), "'<|user|>' is an added token"),
    (lambda folder: change(folder, "config.json", eos_token_id=3), "texts end with token 3, not 50256"),
])
def test_a_tokenizer_that_cannot_be_used_is_refused_by_name(spoil, message, tmp_path):
    random_gpt2(tmp_path / "model", **SMALL)
    tokenizer_of(tmp_path / "model")
    spoil(tmp_path / "model")
    GPT.load(tmp_path / "model")  # as a model it is sound
    for check in (tokenizer_of, models.with_gpt2_tokens):
        with pytest.raises((UserError, DataError), match=message.replace("|", r"\|")) as error:
            check(tmp_path / "model")
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- config.json, tensors

@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"])
def test_other_names_of_the_same_gelu_are_read(name, tmp_path):
    theirs = random_gpt2(tmp_path, std=0.4, **SMALL, vocab_size=99, activation_function=name)
    idx = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(GPT.load(tmp_path)(idx), theirs(idx).logits, atol=1e-4, rtol=0)


def test_every_other_activation_of_transformers_is_refused(tmp_path):
    from transformers.activations import ACT2CLS, ACT2FN

    from plumbing.transformers_format import TANH_GELU

    random_gpt2(tmp_path, **SMALL, vocab_size=99)
    x = torch.linspace(-6, 6, 1001)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    for name in ACT2CLS:
        if name == "prelu":  # it has weights
            continue
        same = ACT2FN[name](x).allclose(expected, atol=1e-6)
        assert same == (name in TANH_GELU), name
        change(tmp_path, "config.json", activation_function=name)
        if not same:
            with pytest.raises(CheckpointError, match=f"activation_function is '{name}'"):
                GPT.load(tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gpt_bigcode"}, "its model_type is 'gpt_bigcode'"), ({"model_type": "openai-gpt"}, "openai-gpt"),
    ({"architectures": ["GPT2ForSequenceClassification"]}, "it is a GPT2ForSequenceClassification"),
    ({"add_cross_attention": True}, "add_cross_attention"), ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"), ({"layer_norm_epsilon": 1e-6}, "epsilon"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ({"auto_map": {"AutoModel": "mine.Model"}}, "auto_map"), ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"n_inner": 65}, "n_inner"), ({"hidden_size": 32}, "hidden_size, its other name"),
    ({"tie_word_embeddings": False}, "no lm_head.weight"),
])
def test_what_config_json_says_otherwise_is_refused_by_name(changes, message, tmp_path):
    random_gpt2(tmp_path, **SMALL, vocab_size=99)
    change(tmp_path, "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        GPT.load(tmp_path)


@pytest.mark.parametrize("changes", [
    {"reorder_and_upcast_attn": True}, {"architectures": ["GPT2Model"]}, {"architectures": None}, {"hidden_size": 16},
    {"n_inner": 64}, {"attn_pdrop": 0.5}, {"pruned_heads": {}}, {"summary_type": "mean"}, {"dtype": "float16"}])
def test_what_changes_nothing_is_read(changes, tmp_path):
    theirs = random_gpt2(tmp_path, **SMALL, vocab_size=99)
    change(tmp_path, "config.json", **changes)
    assert torch.equal(GPT.load(tmp_path).transformer.wte.weight, theirs.transformer.wte.weight)


def test_other_names_alone_are_read(tmp_path):
    theirs = random_gpt2(tmp_path, **SMALL, vocab_size=99)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"hidden_size": values.pop("n_embd"), "num_hidden_layers": values.pop("n_layer"),
               "num_attention_heads": values.pop("n_head"), "max_position_embeddings": values.pop("n_positions")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert torch.equal(GPT.load(tmp_path).transformer.wpe.weight, theirs.transformer.wpe.weight)


def rewrite(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("edit, message", [
    (lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}), "lm_head.weight is another matrix"),
    (lambda w: w.update({"score.weight": torch.ones(2, 16)}), "there is a tensor transformer.score.weight"),
    (lambda w: w.update({"multiple_choice_head.summary.bias": torch.ones(2)}), "multiple_choice_head"),
    (lambda w: w.update({"transformer.h.1.ln_1.weight": torch.ones(16)}), r"there is a tensor transformer.h.1.ln_1"),
    (lambda w: w.update({"transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(16)}), "lora_A"),
    (lambda w: w.pop("transformer.h.0.mlp.c_fc.bias"), "there is no tensor transformer.h.0.mlp.c_fc.bias"),
    (lambda w: w.update({"wte.weight": torch.ones(99, 16)}), "two tensors transformer.wte.weight"),
    (lambda w: w.update({"transformer.ln_f.bias": torch.ones(16).to(torch.int8)}), "ln_f.bias is int8"),
    (lambda w: w.update({"transformer.wpe.weight": torch.ones(32, 16).to(torch.float8_e4m3fn)}), "float8_e4m3fn"),
])
def test_tensors_that_contradict_it_are_refused_by_name(edit, message, tmp_path):
    random_gpt2(tmp_path, **SMALL, vocab_size=99)
    rewrite(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        GPT.load(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_is_read_whatever_the_file_says(tied, tmp_path):
    theirs = random_gpt2(tmp_path, **SMALL, vocab_size=99)
    rewrite(tmp_path, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    change(tmp_path, "config.json", tie_word_embeddings=tied)
    assert torch.equal(GPT.load(tmp_path).lm_head.weight, theirs.lm_head.weight)


def test_an_adapter_beside_the_model_is_refused(tmp_path):
    random_gpt2(tmp_path, **SMALL, vocab_size=99)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter \(LoRA\)"):
        GPT.load(tmp_path)


def test_rows_without_a_tokenizer_stay_and_only_padding_is_dropped(tmp_path):
    random_gpt2(tmp_path / "model", **SMALL, vocab_size=50260)
    export_hf.main([str(tmp_path / "model"), str(tmp_path / "out")])
    assert GPT.load(tmp_path / "out").config.vocab_size == 50260


@pytest.mark.parametrize("under", ["", "subfolder", "a/b"])
def test_folders_in_the_hub_s_cache_are_read_at_any_depth(under, tmp_path, monkeypatch):
    """As huggingface_hub lays it out: the files of a snapshot are links to blobs."""
    theirs = random_gpt2(tmp_path / "model", **SMALL, vocab_size=99)
    repository = tmp_path / "models--me--mine"
    folder = repository / "snapshots" / ("0" * 40) / under
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    ups = "../" * (2 + len([part for part in under.split("/") if part]))
    for path in (tmp_path / "model").iterdir():
        shutil.copyfile(path, repository / "blobs" / f"b_{path.name}")
        (folder / path.name).symlink_to(f"{ups}blobs/b_{path.name}")
    assert torch.equal(GPT.load(folder).transformer.wte.weight, theirs.transformer.wte.weight)
    monkeypatch.chdir(folder)
    assert torch.equal(GPT.load(".").transformer.wte.weight, theirs.transformer.wte.weight)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="is a link to another folder"):
        GPT.load(folder)


def test_a_run_in_a_subfolder_of_a_snapshot_is_read(tmp_path):
    out = tmp_path / "made"
    train(flags(data=write_shards(tmp_path / "data"), out_dir=out, max_steps=2))
    folder = tmp_path / "models--me--mine" / "snapshots" / "abc" / "run"
    folder.mkdir(parents=True)
    (tmp_path / "models--me--mine" / "blobs").mkdir()
    shutil.copyfile(out / "model_000002.pt", tmp_path / "models--me--mine" / "blobs" / "f00")
    (folder / "model_000002.pt").symlink_to("../../../blobs/f00")
    assert GPT.load(folder).config.n_embd == 16


def test_a_mark_in_a_prompt_is_the_token_that_ends_a_text():
    from plumbing.tokenizer import EOT, gpt2_encoding

    ours = model_tokenizer.Gpt2Tokenizer()
    for text in ["<|endoftext|>", "a<|endoftext|><|endoftext|> b ", "", "<|endof text|>", "x" * 99]:
        assert ours.encode(text) == gpt2_encoding().encode(text, allowed_special="all")
    assert ours.encode("a<|endoftext|>")[-1] == EOT
