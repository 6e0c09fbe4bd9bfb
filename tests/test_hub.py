"""Checkpoints by name, from a hub that these tests serve: every byte, and every error."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDENS

import pldr_jax
from pldr_jax.cli.convert import convert_main
from pldr_jax.config import ConfigError
from pldr_jax.interop.convert import import_checkpoint
from pldr_jax.interop.record import inherited_files, read_record
from pldr_jax.training.finetune.begin import model_of

pytest.importorskip("huggingface_hub", reason="the extra hub")

TINY, NAME = GOLDENS / "tiny", "someone/tiny-1"
COMMIT, TAG = "c" * 40, "v1"


class Hub:
    """What is served: files by name, and what is wrong with them.

    Attributes:
      status: of every answer about the repository, with this error code.
      damaged: a file that is sent with its last byte changed.
      fetched, uploaded: names, and contents by name.
    """

    def __init__(self) -> None:
        self.files = {p.name: p.read_bytes() for p in TINY.iterdir() if "golden" not in p.name}
        self.files |= {"modeling_pldrllm.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
        self.status, self.code, self.damaged = 200, "", ""
        self.fetched: list[str] = []
        self.uploaded: dict[str, bytes] = {}


def lfs(name: str, content: bytes) -> str:
    """The hash that the hub states: SHA-256 of weights, git's of other files."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        repository, _, rest = path.removeprefix("/api/models").strip("/").partition("/tiny-1")
        if repository != "someone" or hub.status != 200:
            code = hub.code if repository == "someone" else "RepoNotFound"
            self.reply({}, hub.status if hub.status != 200 else 404, X_Error_Code=code)
        elif rest.startswith("/revision/") and rest.split("/")[-1] not in ("main", TAG, COMMIT):
            self.reply({}, 404, X_Error_Code="RevisionNotFound")
        elif rest.startswith("/resolve/"):
            self.resolve(rest.split("/", 3)[-1])
        elif rest.startswith("/tree/"):
            self.reply([self.entry(name) for name in hub.files])
        else:
            siblings = [{"rfilename": name} for name in hub.files]
            self.reply({"id": NAME, "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET

    def entry(self, name: str) -> dict[str, Any]:
        content = self.hub.files[name]
        entry = {"type": "file", "path": name, "size": len(content), "oid": lfs("", content)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": lfs(name, content), "size": len(content), "pointerSize": 1}
        return entry

    def resolve(self, name: str) -> None:
        content, tag = self.hub.files[name], f'"{lfs(name, self.hub.files[name])}"'
        if self.command == "GET":
            self.hub.fetched.append(name)
            if name == self.hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
        self.reply(content, ETag=tag, X_Linked_Etag=tag, X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.status != 200:
            self.reply({"error": "no"}, self.hub.status)
        elif self.path.endswith("/create"):
            self.reply({"url": f"http://{self.headers['Host']}/{NAME}", "name": NAME})
        elif self.path.endswith("/validate-yaml"):
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            self.reply({"files": [{"path": n, "uploadMode": modes[n.endswith(".safetensors")],
                                   "shouldIgnore": False} for n in named]})  # fmt: skip
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"http://{self.headers['Host']}/blob"}}
            self.reply({"transfer": "basic", "objects": objects})
        else:
            for line in filter(None, body.splitlines()):
                value = json.loads(line)["value"]
                if "content" in value:
                    self.hub.uploaded[value["path"]] = base64.b64decode(value["content"])
            address = f"http://{self.headers['Host']}/{NAME}/commit/{COMMIT}"
            self.reply({"commitUrl": address, "commitOid": COMMIT})

    def do_PUT(self) -> None:
        self.hub.uploaded["blob"] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    served = Hub()
    handler = type("Served", (Handler,), {"hub": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_name_is_fetched_without_code(hub: Hub, tmp_path: Path) -> None:
    lm = pldr_jax.load(NAME)
    assert lm.generate([5, 6], 3)[0].tokens == pldr_jax.load(TINY).generate([5, 6], 3)[0].tokens
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]
    pldr_jax.load(f"{NAME}@{TAG}")
    assert len(hub.fetched) == 2  # of the cache
    assert model_of(NAME) == lm.config
    shutil.copytree(TINY, tmp_path / NAME)  # a path that exists wins
    hub.status = 500
    pldr_jax.load(NAME)
    with pytest.raises(ConfigError, match="^revision = 'v1': someone/tiny-1 is not a name of"):
        pldr_jax.load(NAME, revision=TAG)


def test_the_record_keeps_the_revision(hub: Hub, tmp_path: Path) -> None:
    origin = {"repository": NAME, "revision": TAG, "commit": COMMIT}
    import_checkpoint(f"{NAME}@{TAG}", tmp_path / "run", log=lambda line: None)
    record = read_record(tmp_path / "run")
    assert record is not None and (record.name, record.origin) == (NAME, origin)
    kept = json.loads(inherited_files(tmp_path / "run", {})["transformers/layout.json"])
    assert (kept["name"], kept["origin"]) == (None, origin)
    convert_main(["export", "run", "out"])
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == hub.files[name]
    assert f"imported from `{NAME}`" in (tmp_path / "out" / "README.md").read_text()


def test_what_the_hub_refuses_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, name: str = NAME, **arguments: Any) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            pldr_jax.load(name, **arguments)
        assert "\n" not in str(caught.value)

    refused("^'no/one': no such folder, and the hub has no such repository", "no/one")
    refused("the hub's repository has no revision 'v9'$", revision="v9")
    refused("names one already$", f"{NAME}@v1", revision="v9")
    refused("^'a/b/c': no such folder; give a run folder", "a/b/c")
    Path("runs/nano").mkdir(parents=True)
    refused(r"^'runs/nan': no such folder \(runs holds nano\), and the hub has no such", "runs/nan")
    hub.status, hub.code = 403, "GatedRepo"
    refused("the hub's repository is gated: accept its terms")
    hub.status, hub.damaged = 200, "model.safetensors"
    refused("model.safetensors does not have the hash that the hub states")
    hub.damaged = "config.json"
    shutil.rmtree("hf")
    refused("config.json does not have the hash that the hub states")
    hub.damaged = ""
    pldr_jax.load(NAME)  # what was wrong is not kept
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pldr_jax.load(NAME)
    monkeypatch.setenv("HF_HOME", "empty")
    refused("it is not in the hub's cache, and the hub cannot be reached: is there a network?")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused("it is not in the hub's cache, and the hub cannot be reached: is there a network?")


def test_without_the_library(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'pldr_jax\[hub\]'$"):
        pldr_jax.load(NAME)


def test_push_uploads_the_export(hub: Hub, tmp_path: Path) -> None:
    import_checkpoint(TINY, tmp_path / "run", log=lambda line: None)
    convert_main(["push", "run", NAME, "--license=mit", "--private"])
    convert_main(["export", "run", "out", "--license=mit"])
    uploaded = dict(hub.uploaded)
    assert uploaded.pop("blob") == (tmp_path / "out" / "model.safetensors").read_bytes()
    out = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert uploaded == {name: data for name, data in out.items() if name != "model.safetensors"}
    assert b'license: "mit"' in uploaded["README.md"]
    hub.status = 403
    with pytest.raises(ConfigError, match="^REPO=someone/tiny-1: could not be uploaded .no right"):
        convert_main(["push", "run", NAME])
    with pytest.raises(ConfigError, match="^REPO=tiny: must be OWNER/NAME$"):
        convert_main(["push", "run", "tiny"])
