"""A Hugging Face hub on loopback: the real clients use it, and a test decides what goes wrong."""
import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
FILE = "/{repo_id}/resolve/{revision}/{filename}"  # where a hub has the files of a model


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories, each the files of a folder: `repositories` maps "models/OWNER/NAME" or "datasets/OWNER/NAME" to it.

    `trouble(path)` of a request, where it is set, returns what to do instead of answering: a status to fail with,
    "cut" to send half of the file and hang up, "html" to send a page, "mute" to say nothing until the hub is closed,
    None to answer. `files` maps paths of other sites to what they hold. Uploads are taken from who has `token`, for
    models of `owner`, and end in `uploaded`, {OWNER/NAME: {name: bytes}}.
    """

    repositories, files, trouble, seen, closed = {}, {}, None, [], threading.Event()
    token, owner, uploaded, stored = "hf_token", "me", {}, {}
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append(self.path)
        self.broken = type(self).trouble and type(self).trouble(self.path)
        if isinstance(self.broken, int):
            return self.reply(b"busy", status=self.broken)
        if self.broken == "mute":
            self.closed.wait()
            return
        path, _, query = urllib.parse.unquote(self.path).partition("?")
        if path in self.files:
            return self.reply(self.files[path])
        upload = re.fullmatch(r"/api/repos/create|/api/validate-yaml|/api/models/(.+)/(?:preupload|commit)/main|"
                              r"/(.+)\.git/info/lfs/.+|/put/.+", path)
        if upload:
            return self.take(path, upload[1] or upload[2], body)
        if api := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+(?:/(.*))?)?", path):
            repository, kind, under = api.groups()
            if repository not in self.repositories:
                return self.reply(b"{}", status=404)
            if kind == "tree" and not (self.repositories[repository] / (under or "")).is_dir():
                return self.reply(b"{}", status=404, code="EntryNotFound")
            if kind == "tree":
                return self.reply(self.listing(repository, under or "", "recursive=true" in query.lower()))
            if kind == "paths-info":
                asked = set(json.loads(body)["paths"]) if body.startswith(b"{") else set()
                found = [entry for entry in self.listing(repository, "", True) if entry["path"] in asked]
                return self.reply(found)
            files = [{"rfilename": entry["path"]} for entry in self.listing(repository, "", True)]
            return self.reply({"id": repository.partition("/")[2], "sha": COMMIT, "siblings": files, "private": False,
                               "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []})
        if file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            folder = self.repositories.get((file[1] or "models/") + file[2])
            if folder and (folder / file[3]).is_file():
                return self.reply((folder / file[3]).read_bytes(), ranged=True)
        return self.reply(b"{}", status=404)

    def take(self, path, repository, body):
        """Answer one of the requests of which an upload consists."""
        if path.startswith("/put/"):  # its address is the permission
            self.stored[path.removeprefix("/put/")] = body
            return self.reply({})
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.reply({"error": "Invalid username or password."}, status=401)
        if path.endswith("/create"):
            asked = json.loads(body)
            repository = f"{asked.get('organization', self.owner)}/{asked['name']}"
            if not repository.startswith(self.owner + "/"):
                return self.reply({"error": "You don't have the rights"}, status=403)
            status = 409 if repository in self.uploaded else 200
            self.uploaded.setdefault(repository, {})
            return self.reply({"url": f"http://{self.headers['Host']}/{repository}"}, status=status)
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.reply({"files": [{"path": name, "shouldIgnore": False, "uploadMode": "lfs" if name.endswith(
                ".safetensors") else "regular"} for name in names]})
        if path.endswith("/validate-yaml"):
            return self.reply({"errors": [], "warnings": []})
        if "/info/lfs/" in path:
            here = f"http://{self.headers['Host']}/put/"
            return self.reply({"objects": [{**entry, "actions": {"upload": {"href": here + entry["oid"]}}}
                                           for entry in json.loads(body)["objects"]]})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.uploaded[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.uploaded[repository][value["path"]] = self.stored[value["oid"]]
        return self.reply({"success": True, "commitUrl": f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}",
                           "commitOid": COMMIT})

    def listing(self, repository, under, recursive):
        root = self.repositories[repository]
        entries = []
        for path in sorted((root / under).rglob("*") if recursive else (root / under).glob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_dir():
                entries.append({"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
            else:
                digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
                entries.append({"type": "file", "path": name, "oid": "0" * 40, "size": size,
                                "lfs": {"oid": digest, "size": size, "pointerSize": 130}})
        return entries

    def reply(self, data, status=200, ranged=False, code=""):
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        if self.broken == "html":
            data, ranged = b"<html><body>Please log in</body></html>", False
        digest, length = hashlib.sha256(data).hexdigest(), len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if ranged else None
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or length - 1), length - 1)
            data, status = data[start:end + 1], 206
        self.send_response(status)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end}/{length}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "text/html" if self.broken == "html" else "application/octet-stream")
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        if self.broken == "cut":
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(data[:len(data) // 2] if self.broken == "cut" else data)
                self.wfile.flush()
        if self.broken == "cut":
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def hub(repositories: dict[str, Path], cache: Path):
    """A hub with these repositories -> (the environment that makes it the hub, its handler class)."""
    handler = type("ThisHub", (Hub,), {"repositories": repositories, "seen": [], "uploaded": {}, "stored": {},
                                       "closed": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
               "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
               "no_proxy": "127.0.0.1"}, handler
    finally:
        handler.closed.set()
        server.shutdown()
        server.server_close()


def use_here(environment: dict[str, str], monkeypatch) -> list[float]:
    """Make a hub that of the clients in this process, which wait for nothing -> the seconds that ours would wait."""
    import datasets
    from huggingface_hub import HfFileSystem, constants, file_download
    from huggingface_hub.utils import _http

    from plumbing import network

    waits, home, endpoint = [], Path(environment["HF_HOME"]), environment["HF_ENDPOINT"]
    clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds, *_, **__: None})
    values = {
        constants: {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + FILE, "HF_HOME": str(home),
                    "HF_HUB_CACHE": str(home / "hub"), "HF_ASSETS_CACHE": str(home / "assets"),
                    "HF_TOKEN_PATH": str(home / "token"), "HF_HUB_OFFLINE": environment["HF_HUB_OFFLINE"] == "1",
                    "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_XET": True},
        datasets.config: {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": environment["HF_HUB_OFFLINE"] == "1"},
        _http: {"time": clock}, file_download: {"time": clock},
        network: {"wait": lambda seconds, *_, **__: waits.append(seconds)},
    }
    for owner, changes in values.items():
        for name, value in changes.items():
            monkeypatch.setattr(owner, name, value)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    HfFileSystem.clear_instance_cache()  # which holds lists of files
    return waits


COMMAND = """
import runpy
from plumbing import published
published.MODELS["gpt2"] = ({commit!r}, {known!r})
runpy.run_path({script!r}, run_name="__main__")
"""


def with_gpt2(model: Path, script: Path, folder: Path) -> Path:
    """A script in `folder` that does what `script` does, where the weights in `model` count as OpenAI's gpt2."""
    known = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    path = folder / f"with_gpt2_{script.name}"
    path.write_text(COMMAND.format(commit=COMMIT, known=known, script=str(script)))
    return path
