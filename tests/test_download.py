"""OpenAI's weights by name: the real download, from a server on loopback that speaks the hub's protocol."""
import hashlib
import http.server
import json
import threading

import pytest
import torch
from conftest import flags, run
from safetensors.torch import load_file
from test_model import random_gpt2

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, openai-community/gpt2, with the files of `folder`; `trouble` breaks it."""

    folder, trouble, seen = None, None, []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.seen.append(self.path)
        name = self.path.split("?")[0].rpartition("/")[2]
        files = ["config.json", "model.safetensors", "flax_model.msgpack"]
        if self.trouble == "500":
            return self.send_error(500)
        if self.path.startswith("/api/models/openai-community/gpt2"):
            listing = [{"type": "file", "path": file, "rfilename": file, "size": 1, "oid": "0"} for file in files]
            data = json.dumps(listing if "/tree/" in self.path else {
                "id": "openai-community/gpt2", "sha": COMMIT, "siblings": listing}).encode()
        elif "/resolve/" in self.path and name in files[:2]:
            data = (self.folder / name).read_bytes()
        else:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data[:len(data) // 2] if self.trouble == "cut" else data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    """(the environment that makes the loopback server the hub, its handler class)."""
    random_gpt2(tmp_path / "model", n_layer=1, n_head=2, n_embd=16, n_positions=32)
    handler = type("ThisHub", (Hub,), {"folder": tmp_path / "model", "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
                   "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    yield environment, handler
    server.shutdown()
    server.server_close()


def test_openai_s_weights_are_downloaded_and_evaluated(hub, shard_folder, tmp_path):
    environment, handler = hub
    arguments = flags(data=shard_folder, init_from="gpt2", out_dir=tmp_path / "named", checkpoint_every=0, max_steps=1)
    result = run(arguments, **environment)
    assert result.returncode == 0, result.stderr
    state = torch.load(tmp_path / "named" / "model_000001.pt")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert state["model_config"]["n_layer"] == 1 and state["model"]["lm_head.weight"].shape == (50257, 16)
    moved = abs(state["model"]["lm_head.weight"] - weights["transformer.wte.weight"]).max()
    assert 0 < moved <= 0.011  # one step at lr 0.01
    assert not any("flax_model" in path for path in handler.seen)  # only the two files that are read
    offline = run([*arguments[:-2], "--max_steps", "0", "--out_dir", str(tmp_path / "again")],
                  **{**environment, "HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr  # the second time comes from the cache


@pytest.mark.parametrize("trouble", ["500", "cut"])
def test_a_hub_in_trouble_is_one_line(hub, trouble, shard_folder, tmp_path):
    environment, handler = hub
    handler.trouble = trouble
    result = run(flags(data=shard_folder, init_from="gpt2", out_dir=tmp_path / "out"), **environment)
    assert result.returncode == 2
    assert "error: cannot download gpt2 from the Hugging Face hub" in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
