"""OpenAI's weights by name: the real download, from a hub on loopback.

    pytest tests/test_download.py
"""
import hashlib

import pytest
import torch
from helpers import ROOT, flags, random_gpt2, run
from hub import COMMIT, hub, use_here, with_gpt2
from safetensors.torch import load_file

import train_gpt2
from plumbing import published
from plumbing.cli import UserError
from plumbing.files import CheckpointError


def train(**changes) -> None:
    """Run train_gpt2.py in this process."""
    train_gpt2.main(train_gpt2.parse_args(flags(**changes)))


@pytest.fixture
def gpt2_hub(tmp_path):
    """(the environment that makes a loopback server the hub, its handler class): a tiny GPT-2 under OpenAI's name."""
    random_gpt2(tmp_path / "model", n_layer=1, n_head=2, n_embd=16, n_positions=32)
    (tmp_path / "model" / "flax_model.msgpack").write_text("another format")
    with hub({"models/openai-community/gpt2": tmp_path / "model"}, tmp_path / "cache") as both:
        yield both


def test_openai_s_weights_are_downloaded_and_evaluated(gpt2_hub, shard_folder, tmp_path, monkeypatch):
    environment, handler = gpt2_hub
    script = with_gpt2(tmp_path / "model", ROOT / "train_gpt2.py", tmp_path)
    arguments = flags(data=shard_folder, init_from="gpt2", out_dir=tmp_path / "named", checkpoint_every=0, max_steps=1)
    result = run(arguments, script=script, **environment)
    assert result.returncode == 0, result.stderr
    state = torch.load(tmp_path / "named" / "model_000001.pt")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert state["model_config"]["n_layer"] == 1 and state["model"]["lm_head.weight"].shape == (50257, 16)
    moved = abs(state["model"]["lm_head.weight"] - weights["transformer.wte.weight"]).max()
    assert 0 < moved <= 0.011  # one step at lr 0.01
    assert not any("flax_model" in path for path in handler.seen)  # only the two files that are read
    files = [path for path in handler.seen if "/resolve/" in path]
    assert len(files) >= 2 and all(f"/resolve/{COMMIT}/" in path for path in files)
    use_here({**environment, "HF_HUB_OFFLINE": "1"}, monkeypatch)  # the second time comes from the cache
    known = hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(published.MODELS, "gpt2", (COMMIT, known))
    handler.seen.clear()
    train(data=shard_folder, init_from="gpt2", out_dir=tmp_path / "again", max_steps=0)
    assert handler.seen == [] and (tmp_path / "again" / "eval.jsonl").exists()


def test_other_content_under_openai_s_name_is_refused(gpt2_hub, shard_folder, tmp_path, monkeypatch):
    environment, _ = gpt2_hub
    use_here(environment, monkeypatch)
    with pytest.raises((UserError, CheckpointError)) as error:
        train(data=shard_folder, init_from="gpt2", out_dir=tmp_path / "out")
    last = str(error.value)
    assert "model.safetensors is not OpenAI's gpt2, whose sha256 begins with 248dfc391186: delete " in last
    assert last.split(": delete ")[1].split()[0].endswith("models--openai-community--gpt2")  # with the blobs


def test_the_pinned_revisions_are_whole_commits():
    for revision, known in published.MODELS.values():
        assert len(revision) == 40 and int(revision, 16)
        assert known is None or (len(known) == 64 and int(known, 16))


@pytest.mark.parametrize("what, where", [(500, "/"), ("cut", "/resolve/")])
def test_a_hub_in_trouble_is_one_line(gpt2_hub, what, where, shard_folder, tmp_path, monkeypatch):
    environment, handler = gpt2_hub
    use_here(environment, monkeypatch)
    handler.trouble = staticmethod(lambda path: what if where in path else None)
    with pytest.raises((UserError, CheckpointError), match="cannot download gpt2 from the Hugging Face hub") as error:
        train(data=shard_folder, init_from="gpt2", out_dir=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert len([path for path in handler.seen if where in path]) > 5  # the hub's client has tried it again


def test_without_a_hub_the_command_ends_with_code_2_and_one_line(shard_folder, tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = run(flags(data=shard_folder, init_from="gpt2", out_dir=tmp_path / "out"), **environment)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: cannot download gpt2 from the Hugging Face hub")
    assert len(result.stderr.splitlines()) == 1
