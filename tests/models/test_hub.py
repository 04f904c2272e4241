"""A merged model or an adapter on its way to the hub: what a hub on this machine is asked."""

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from san.adapted import adapt
from tiny import save_tiny, tiny_model

ASKED = ("merge", "--adapter", "adapter", "--model", "base", "--output", "out", "--push")


class Hub(ThreadingHTTPServer):
    """A hub that knows one answer, and what it was asked."""

    answer = 200
    asked: list[tuple[str, str | None, dict]]


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(
            (self.path, self.headers.get("Authorization"), json.loads(body or b"{}"))
        )
        made = self.path == "/api/repos/create"
        url = f"http://127.0.0.1:{self.server.server_port}/owner/mine"
        text = json.dumps({"url": url} if made else {"error": "full up"})
        code = self.server.answer if made else 507
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), _Handler)
    server.asked = []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pair(here):
    save_tiny(here / "base", num_hidden_layers=1)
    adapt(tiny_model(num_hidden_layers=1)).save_pretrained(here / "adapter")


def refused(done, code, *told):
    assert (done.returncode, done.stdout) == (code, "")
    (error,) = (line for line in done.stderr.splitlines() if not line.startswith("Merging:"))
    assert error.startswith("error: ")
    for part in told:
        assert part in error


def test_the_hub_is_asked_for_the_repository_and_the_folder_stays_when_it_refuses(cli, pair, hub):
    where = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_mine",
    }
    done = cli(*ASKED, "owner/mine", "--private", **where)
    refused(
        done, 1, "owner/mine: not pushed: full up; the model is in out, `hf upload owner/mine out`"
    )
    (path, token, wanted), (then, _, card) = hub.asked[:2]
    assert (path, token) == ("/api/repos/create", "Bearer hf_mine")
    assert (wanted["organization"], wanted["name"]) == ("owner", "mine")
    assert wanted.get("visibility", wanted.get("private")) in ("private", True)
    assert then == "/api/validate-yaml"
    assert card["content"] == Path("out/README.md").read_text()
    assert {"config.json", "model.safetensors", "README.md"} <= set(os.listdir("out"))
    hub.answer = 403
    done = cli(*ASKED, "owner/mine", "--overwrite", **where)
    refused(done, 1, "owner/mine: not pushed: not open to you; the model is in out")


def test_offline_is_one_line_and_the_folder_stays(cli, pair):
    done = cli(*ASKED, "owner/mine", HF_TOKEN="hf_mine", HF_HUB_OFFLINE="1")
    refused(done, 1, "owner/mine: not pushed: the hub is switched off (HF_HUB_OFFLINE); the mod")
    assert Path("out/model.safetensors").is_file()
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_mine"}
    done = cli(*ASKED, "owner/mine", "--overwrite", **nowhere)
    refused(done, 1, "owner/mine: not pushed: ", "; the model is in out, `hf upload owner/mine")


def test_what_cannot_be_pushed_is_refused_before_the_merge(command, pair, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    for name in ("mine", "owner/", "a/b/c", "o wner/mine"):
        refused(command(*ASKED, name), 2, f"--push: {name!r} is not a hub id; expected something")
    refused(command(*ASKED[:-1], "--private"), 2, "--private: says how to --push")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused(command(*ASKED, "owner/mine"), 2, "--push: nobody is signed in to the hub: `hf auth")
    assert not Path("out").exists()


def test_an_adapter_is_shown_and_pushed_with_its_card(cli, pair, hub):
    card = "---\nlibrary_name: peft\n---\n# Mine\n"
    Path("adapter/README.md").write_text(card)
    done = cli("push", "owner/mine", "adapter", "--dry-run", HF_TOKEN="")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "adapter to owner/mine:"
    assert [line.split()[0] for line in lines[1:]] == sorted(os.listdir("adapter"))
    where = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_mine",
    }
    done = cli("push", "owner/mine", "adapter", **where)
    refused(done, 1, "owner/mine: not pushed: full up; the model is in adapter, `hf upload owner/")
    assert [path for path, *_ in hub.asked[:2]] == ["/api/repos/create", "/api/validate-yaml"]
    assert hub.asked[1][2]["content"] == card


def test_what_is_no_adapter_or_leads_elsewhere_is_not_pushed(command, pair, here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    Path("empty").mkdir()
    refused(command("push", "owner/mine", "empty"), 2, "empty: neither a run, nor an adapter")
    refused(command("push", "mine", "adapter"), 2, "HUB_ID: 'mine' is not a hub id")
    refused(command("push", "owner/mine"), 2, "runs/latest: no run yet in this directory")
    (here / "secret").write_text("mine")
    (here / "adapter" / "notes").symlink_to(here / "secret")
    refused(command("push", "owner/mine", "adapter"), 2, "adapter/notes: a symbolic link out of")
    done = command("push", "owner/mine", "base", "--dry-run", "--json")
    assert json.loads(done.stdout)["files"]["config.json"] > 0
