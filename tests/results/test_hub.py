"""Vectors go to the hub and come back, through the hub's own client and a small hub made here."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import prototok
from prototok import FrozenLM, Prior, ProtoTokens
from prototok.fitting.shipped import shipped

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Repositories of regular files, as far as the client asks for them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}  # by repository/name
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("authorization") != "Bearer hf_right":
            self.say(401, b"{}", {"X-Error-Message": "Invalid user token."})
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            self.say_json({"url": f"{self.server.endpoint}/{made['organization']}/{made['name']}"})
        elif self.path == "/api/validate-yaml":
            self.say_json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            rest = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.say_json({"files": [{"path": one["path"]} | rest for one in asked]})
        elif "/commit/" in self.path:
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    content = base64.b64decode(value["content"])
                    self.server.files[f"{repo}/{value['path']}"] = content
            url = f"{self.server.endpoint}/{repo}/commit/{COMMIT}"
            self.say_json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.say(404, b"{}")

    def do_GET(self) -> None:
        repo, _, rest = self.path[1:].partition("/resolve/")
        content = self.server.files.get(f"{repo}/{rest.partition('/')[2]}")
        if content is None:
            self.say(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            tag = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self.say(200, content, tag)

    do_HEAD = do_GET

    def say_json(self, value: object) -> None:
        self.say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def say(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def tokens(tiny_lm: FrozenLM) -> ProtoTokens:
    return prototok.fast_fit(tiny_lm, ["Call me Ishmael."], prefix=" the").tokens


def test_tokens_come_back_and_decode(tokens: ProtoTokens, tiny_lm: FrozenLM, hub: Hub) -> None:
    url = tokens.push_to_hub("me/mine", token="hf_right", endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/me/mine/commit/{COMMIT}"
    again = ProtoTokens.from_pretrained("me/mine", endpoint=hub.endpoint)
    assert torch.equal(again.e, tokens.e) and again.prefix is not None
    assert prototok.decode(tiny_lm, again, text=True) == ["Call me Ishmael."]
    card = hub.files["me/mine/README.md"].decode()
    assert tokens.model.fingerprint in card and 'from_pretrained("me/mine")' in card
    assert "base_model" not in card  # tiny-llama is on no hub


def test_a_prior_comes_back(hub: Hub, tiny_lm: FrozenLM) -> None:
    prior = shipped(Prior, tiny_lm)
    assert prior is not None
    prior.push_to_hub("me/prior", token="hf_right", endpoint=hub.endpoint)
    again = Prior.from_pretrained("me/prior", endpoint=hub.endpoint)
    assert torch.equal(again.mean, prior.mean) and again.model == prior.model


def test_a_card_that_is_there_stays(tokens: ProtoTokens, hub: Hub) -> None:
    hub.files["me/mine/README.md"] = b"years of work"
    tokens.push_to_hub("me/mine", token="hf_right", endpoint=hub.endpoint)
    assert hub.files["me/mine/README.md"] == b"years of work"
    assert "me/mine/proto_tokens.safetensors" in hub.files


def test_a_folder_here_needs_no_hub(tokens: ProtoTokens, tmp_path: Path) -> None:
    tokens.save(tmp_path / "proto_tokens.safetensors")
    assert torch.equal(ProtoTokens.from_pretrained(tmp_path).e, tokens.e)


def test_what_the_hub_refuses_is_one_sentence(tokens: ProtoTokens, hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"^repo_id: 'me/mine' could not be written \(.*401"):
        tokens.push_to_hub("me/mine", token="hf_wrong", endpoint=hub.endpoint)
    with pytest.raises(ValueError, match=r"^repo_id: 'me/none' could not be read \("):
        ProtoTokens.from_pretrained("me/none", endpoint=hub.endpoint)
    with pytest.raises(ValueError, match=r"^repo_id: 'a/b/c' could not be read \("):
        ProtoTokens.from_pretrained("a/b/c", endpoint=hub.endpoint)
    hub.files["me/other/proto_tokens.safetensors"] = b"not ours"
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        ProtoTokens.from_pretrained("me/other", endpoint=hub.endpoint)
    assert set(hub.files) == {"me/other/proto_tokens.safetensors"}
