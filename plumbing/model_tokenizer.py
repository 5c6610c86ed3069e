"""The tokenizer that a model's prompts need: GPT-2's own, or what a transformers folder brings.

    tokenizer_of(source)          Gpt2Tokenizer or OwnTokenizer of a checkpoint, a folder or one of OpenAI's names
    require_gpt2_tokens(source)   raises UserError unless the model's tokens are GPT-2's

Both have `name`, `size` (all ids are below), `first` (which begins a text without a prompt), `ends` (ids that end a
text), `files` (to copy beside the model), `has_gpt2_tokens` (whether GPT-2's tokens are the model's), encode(prompt)
and decoder(prompt's ids).
"""
import codecs
import json
import math
from pathlib import Path

from plumbing import published
from plumbing.cli import UserError, explain
from plumbing.files import check_inside
from plumbing.tokenizer import EOT, VOCAB_SIZE, encode, gpt2_encoding, vocabulary_files

END = "<|endoftext|>"
MAIN_FILES = ("tokenizer.json", "vocab.json")  # one of these holds the vocabulary
OTHER_KINDS = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "tekken.json")
FILES = (*MAIN_FILES, "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
         "chat_template.jinja")
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in transformers' order
PADDED = (VOCAB_SIZE, 50304)  # rows of models whose tokens are GPT-2's
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
RESAVE = ("load it with transformers' AutoTokenizer and save it into the folder with save_pretrained(), which writes "
          "tokenizer.json")


class Gpt2Tokenizer:
    """GPT-2's own tokenizer, in which <|endoftext|> in a prompt is the token that ends a text."""

    name = "GPT-2's tokenizer"
    size, first, ends, has_gpt2_tokens = VOCAB_SIZE, EOT, frozenset([EOT]), True

    def __init__(self, files=()):
        self.files = files

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt."""
        first, *others = prompt.split(END)
        return [*encode(first), *(token for part in others for token in (EOT, *encode(part)))]

    def decoder(self, prompt: list[int]) -> "Gpt2Decoder":
        """Return what turns the ids after a prompt into text, one by one."""
        return Gpt2Decoder()


class Gpt2Decoder:
    """Text of one id after another; a character that is not whole yet is held back."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        """Return the text that `token` completes."""
        return self.decoder.decode(gpt2_encoding().decode_single_token_bytes(token))

    def end(self) -> str:
        """Return what is left at the end of a text."""
        return self.decoder.decode(b"", final=True)


class OwnTokenizer:
    """The tokenizer of a transformers folder, as the library `tokenizers` loads it.

    Texts end at its eos_token, and at those of config.json and generation_config.json that are special tokens: what
    is an ordinary word of this vocabulary ends none, though GPT-2's 50256 is often left in there.
    """

    def __init__(self, folder: Path, description: dict, settings: dict):
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(json.dumps(description))
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab()
        wrong = [token for token in description.get("added_tokens") or []
                 if vocabulary.get(token["content"]) != token["id"]]
        if wrong:
            raise ValueError(f"it gives {wrong[0]['content']!r} another number than {wrong[0]['id']}")
        self.size = max(vocabulary.values()) + 1
        self.name = f"its own tokenizer of {len(vocabulary):,} tokens"
        self.files = files_of(folder)
        special = {token["id"] for token in description.get("added_tokens") or [] if token.get("special")}
        eos, bos = (vocabulary.get(content(settings.get(key))) for key in ("eos_token", "bos_token"))
        self.ends = frozenset(({eos} | (end_ids(folder) & special)) - {None})
        self.first = bos if bos is not None else next(iter(sorted(self.ends)), None)
        self.has_gpt2_tokens = is_gpt2(description, settings, read_json(folder / "config.json").get("vocab_size", 0))
        self.prefix = [bos] if settings.get("add_bos_token") and bos is not None else []

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, with what the tokenizer puts in front of it.

        What it puts behind is left out, as it would end the text.
        """
        found = self.backend.encode(prompt)
        ids, added = found.ids, found.special_tokens_mask
        while ids and added[-1]:
            ids, added = ids[:-1], added[:-1]
        return ids if ids[:1] == self.prefix and added[:1] == [1] else [*self.prefix, *ids]

    def decoder(self, prompt: list[int]) -> "OwnDecoder":
        """Return what turns the ids after a prompt into text, one by one."""
        return OwnDecoder(self.backend, prompt)


class OwnDecoder:
    """Text of one id after another; a character that is not whole yet is held back."""

    def __init__(self, backend, prompt: list[int]):
        from tokenizers.decoders import DecodeStream

        self.backend, self.waiting = backend, []
        self.stream = DecodeStream(ids=prompt, skip_special_tokens=False)

    def step(self, token: int) -> str:
        """Return the text that `token` completes."""
        text = self.stream.step(self.backend, token)
        self.waiting = [*self.waiting, token] if text is None else []
        return text or ""

    def end(self) -> str:
        """Return what is left at the end of a text."""
        return self.backend.decode(self.waiting, skip_special_tokens=False) if self.waiting else ""


def tokenizer_of(source):
    """Return the tokenizer of a model: a state that models.find() has loaded, or a folder or name.

    Raises UserError if it is neither GPT-2's nor one that can be loaded, or DataError for a link out of the folder.
    """
    if isinstance(source, dict):
        rows, program = source["model_config"].get("vocab_size"), source.get("program")
        if program and rows not in PADDED:
            raise UserError(f"{source['path']} is {program}'s with {rows} tokens, which are not GPT-2's: it cannot be "
                            "given text here, only loaded (GPT.load)")
        return Gpt2Tokenizer()
    folder = Path(source)
    if source in published.MODELS and not folder.is_dir():
        return Gpt2Tokenizer()
    try:
        description, settings = read_tokenizer(folder)
        if description is None or is_gpt2(description, settings):
            return Gpt2Tokenizer([] if description is None else files_of(folder))
        return OwnTokenizer(folder, description, settings)
    except (ModuleNotFoundError, OSError, UserError):
        raise
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"the tokenizer in {folder} cannot be used, and it is not GPT-2's: {explain(error)}") from error


def require_gpt2_tokens(source) -> None:
    """Raise UserError unless the tokens of a model are GPT-2's; `source` is as in tokenizer_of()."""
    tokenizer = tokenizer_of(source)
    if not tokenizer.has_gpt2_tokens:
        raise UserError(f"{source} has {tokenizer.name}, but this needs GPT-2's: use generate.py, or transformers, for "
                        "this model")


def files_of(folder: Path) -> list[Path]:
    """List the files of a folder's tokenizer."""
    found = [folder / name for name in FILES if (folder / name).exists()]
    for path in found:
        check_inside(path)
    return found


def content(token) -> str | None:
    """Return the text of a token, which is a str or a dict in the files."""
    return token.get("content") if isinstance(token, dict) else token


def read_json(path: Path) -> dict:
    """Return what a JSON file of the folder holds; empty if there is none."""
    check_inside(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def end_ids(folder: Path) -> set:
    """Return the ids that config.json and generation_config.json say end a text."""
    found = [read_json(folder / name).get("eos_token_id") for name in ("config.json", "generation_config.json")]
    return {token for ids in found for token in (ids if isinstance(ids, list) else [ids])}


def read_tokenizer(folder: Path) -> tuple[dict | None, dict]:
    """Read a folder's tokenizer -> (what tokenizer.json holds, or would hold; its settings).

    The first is None if the folder brings none, and nothing in its configuration is against GPT-2's. Raises UserError
    for a tokenizer of a kind that is not read.
    """
    config = read_json(folder / "config.json")
    settings = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    kind = settings.get("tokenizer_class", config.get("tokenizer_class"))
    if (folder / "tokenizer.json").exists():
        description = read_json(folder / "tokenizer.json")
        settings.pop("add_bos_token", None)  # transformers goes by the template in tokenizer.json then
        pre_tokenizer = description.get("pre_tokenizer") or {}
        if pre_tokenizer.get("type") == "ByteLevel" and "add_prefix_space" in settings:
            pre_tokenizer["add_prefix_space"] = settings["add_prefix_space"]  # as transformers does
    else:
        other = [name for name in OTHER_KINDS if (folder / name).exists()]
        if other or kind not in GPT2_CLASSES or settings.get("auto_map"):
            named = f" ({other[0]})" if other else ""
            raise UserError(f"{folder} has a {kind or 'tokenizer'}{named} instead of GPT-2's tokenizer, and no "
                            f"tokenizer.json: {RESAVE}")
        if (folder / "vocab.json").exists() != (folder / "merges.txt").exists():
            raise UserError(f"{folder} has only one of vocab.json and merges.txt: copy the other, or {RESAVE}")
        if not (folder / "vocab.json").exists():
            check_no_sign_of_another(folder, config, settings)
            return None, settings
        description = describe_bpe(folder, settings)
    add_tokens(description, settings, read_json(folder / "added_tokens.json"))
    if kind in GPT2_CLASSES[:3] and END in description["model"].get("vocab", {}):
        settings = {"bos_token": END, "eos_token": END, **settings}  # that class's defaults
    return description, settings


def check_no_sign_of_another(folder: Path, config: dict, settings: dict) -> None:
    """Raise UserError if a folder without a vocabulary has tokens that GPT-2's does not have."""
    ends, added = config.get("eos_token_id"), read_json(folder / "added_tokens.json")
    added = [*added, *(content(token) for token in settings.get("added_tokens_decoder", {}).values())]
    added = [token for token in added if token != END]
    if added or ends not in (None, EOT, [EOT]):
        sign = f"{added[0]!r} is an added token" if added else f"texts end with token {ends}, not {EOT}"
        raise UserError(f"the tokenizer of {folder} is missing, and it is not GPT-2's, as {sign}: copy tokenizer.json "
                        "from where the model comes from")


def describe_bpe(folder: Path, settings: dict) -> dict:
    """Return what tokenizer.json would hold for a folder with vocab.json and merges.txt, GPT-2's older layout."""
    check_inside(folder / "merges.txt")
    vocabulary, merges = read_json(folder / "vocab.json"), read_merges(folder / "merges.txt")
    pre_tokenizer = {**BYTE_LEVEL, "add_prefix_space": bool(settings.get("add_prefix_space"))}
    special = {content(settings.get(f"{key}_token")) for key in ("bos", "eos", "unk", "pad")} & vocabulary.keys()
    return {"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
            "pre_tokenizer": pre_tokenizer, "decoder": BYTE_LEVEL,
            "added_tokens": [as_added(token, vocabulary[token], True)
                             for token in sorted(special | ({END} & vocabulary.keys()), key=vocabulary.get)]}


def read_merges(path: Path) -> list[list[str]]:
    """Return the pairs of a merges.txt."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line.split(" ") for line in lines if line and not line.startswith("#version")]


def as_added(token: str, number: int, special: bool) -> dict:
    """Return an entry of added_tokens in tokenizer.json."""
    return {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}


def add_tokens(description: dict, settings: dict, added: dict) -> None:
    """Add the tokens that other files name, as transformers does when it loads a tokenizer."""
    entries = {token["content"]: token for token in description.get("added_tokens") or []}
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra
    named = [content(token) for token in (*(settings.get(f"{key}_token") for key in SPECIAL), *extra)]
    special = [token for token in named if token]
    if "added_tokens_decoder" in settings:
        for number, token in settings["added_tokens_decoder"].items():
            kept = {key: token[key] for key in as_added("", 0, True) if key in token}
            entries.setdefault(token["content"], as_added(token["content"], int(number), False) | kept)
    else:
        for token, number in added.items():
            entries.setdefault(token, as_added(token, number, token in special))
    vocabulary = description["model"].get("vocab", {})
    known = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    size = 1 + max([*known.values(), *(token["id"] for token in entries.values())], default=-1)
    for token in [token for token in dict.fromkeys(special) if token not in entries]:  # these follow the others
        entries[token] = as_added(token, known.get(token, size), True)
        size += token not in known
    description["added_tokens"] = sorted(entries.values(), key=lambda token: token["id"])


def adds_nothing(processor: dict) -> bool:
    """Return whether a post_processor of tokenizer.json leaves a text as it is, without tokens around it."""
    if processor["type"] == "Sequence":
        return all(map(adds_nothing, processor["processors"]))
    is_plain_template = processor["type"] == "TemplateProcessing" and ["Sequence"] == [
        key for part in processor["single"] for key in part]
    return processor["type"] == "ByteLevel" or is_plain_template


def is_gpt2(description: dict, settings: dict, rows: float = math.inf) -> bool:
    """Return whether a tokenizer gives GPT-2's own ids, whatever the form in which it has been saved.

    Added tokens count only if the model has `rows` enough for them.
    """
    model, files = description["model"], vocabulary_files()
    merges = [list(pair) if not isinstance(pair, str) else pair.split(" ") for pair in model.get("merges") or []]
    pre_tokenizer = description.get("pre_tokenizer") or {}
    plain = {key: pre_tokenizer.get(key, value) for key, value in BYTE_LEVEL.items() if key != "trim_offsets"}
    plain["type"] = pre_tokenizer.get("type")
    return (
        model.get("type", "BPE") == "BPE" and not model.get("dropout") and not model.get("ignore_merges")
        and description.get("normalizer") is None and not settings.get("add_bos_token")
        and plain == {key: BYTE_LEVEL[key] for key in plain}
        and adds_nothing(description.get("post_processor") or BYTE_LEVEL)
        and all((token["content"], token["id"]) == (END, EOT) or token["id"] >= max(rows, VOCAB_SIZE)
                for token in description["added_tokens"])
        and model["vocab"] == json.loads(files["encoder.json"].read_text(encoding="utf-8"))
        and merges == read_merges(files["vocab.bpe"])
    )
