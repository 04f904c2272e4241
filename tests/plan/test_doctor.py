"""The doctor looks at what is there: a real hub that answers or not, real folders, real sums."""

import json
import re
import socket
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from packaging.version import Version

from san_llm.models import load as loading
from san_llm.plan import doctor


@pytest.mark.slow
def test_a_sound_machine_passes_and_a_folder_that_cannot_be_written_fails(cli, here):
    done = cli("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert {line[0] for line in lines} <= {"ok", "warning"}
    assert "hub switched off (HF_HUB_OFFLINE)" in " ".join(done.stdout.split())
    (here / "file").write_text("")
    done = cli("doctor", "--json", SAN_LLM_CACHE=str(here / "file" / "cache"))
    said = json.loads(done.stdout)
    assert (done.returncode, said["ok"], done.stderr) == (1, False, "")
    (wrong,) = (one for one in said["findings"] if one["state"] == "error")
    assert wrong["what"] == "cache"
    assert wrong["found"] == f"{here}/file/cache: Not a directory"
    assert wrong["remedy"] == "set SAN_LLM_CACHE to another folder"
    tried = {one["what"]: one["found"] for one in said["findings"]}
    assert {"python", "packages", "bfloat16", "4 bits", "two processes"} <= set(tried)
    assert tried["two processes"] == "have added their numbers up (gloo)"
    assert [path.name for path in here.iterdir()] == ["file"], "nothing is left behind"


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def at(port):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        (finding,) = doctor._hub()
        return finding

    return at


def test_a_hub_that_answers_anything_is_reachable(online):
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    finding = online(server.server_port)
    server.shutdown()
    server.server_close()
    assert finding.state == "ok"
    assert f"127.0.0.1:{server.server_port} answers" in finding.found


def test_a_hub_that_is_away_or_silent_is_a_warning_within_the_time_out(online):
    finding = online(9)  # nothing listens there
    assert (finding.state, "refused" in finding.found) == ("warning", True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        finding = online(silent.getsockname()[1])
        assert finding.state == "warning"
        assert time.monotonic() - began < 60
    assert "HF_ENDPOINT names a mirror" in finding.remedy


def test_packages_that_do_not_fit_are_named_with_the_command_that_mends_them(monkeypatch):
    monkeypatch.setattr(
        *(doctor, "requires"),
        lambda name: ["torch>=99", "no-such-thing>=1", "numpy>=2", "absent; extra == 'dev'"],
    )
    found = [(one.what, one.state, one.remedy) for one in doctor._packages()]
    assert found == [
        ("torch", "error", "pip install 'torch>=99'"),
        ("no-such-thing", "error", "pip install 'no-such-thing>=1'"),
    ]


def test_a_transformers_that_wants_a_newer_peft_is_told(monkeypatch):
    from transformers.integrations import peft

    assert Version(peft.MIN_PEFT_VERSION) > Version("0.17")
    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", version("peft"))
    assert not list(doctor._load_adapter())
    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "99.0")
    (finding,) = doctor._load_adapter()
    assert finding.state == "warning"
    assert f"wants PEFT 99.0 or newer, here is {version('peft')}" in finding.found
    assert "PeftModel.from_pretrained" in finding.remedy


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken():
        raise OSError("libcudart.so\x1b is away")
        yield

    monkeypatch.setattr(doctor, "_devices", broken)
    monkeypatch.setattr(doctor, "_pair", broken)
    found = {one.what: one for one in doctor.diagnose()}
    assert found["devices"].state == "error"
    assert found["devices"].found == "OSError: libcudart.so\\x1b is away"
    assert found["4 bits"].state == "ok"
    assert found["two processes"].state == "error"


def test_processes_that_cannot_meet_are_a_warning_with_their_last_words(monkeypatch):
    monkeypatch.setattr(doctor, "PAIR", "raise SystemExit('no interface')")
    (finding,) = doctor._pair()
    assert (finding.state, finding.found) == ("warning", "no interface")
    monkeypatch.setattr(doctor, "PAIR", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "PAIR_SECONDS", 0.5)
    (finding,) = doctor._pair()
    assert "no sum" in finding.found


def test_little_disk_is_told(monkeypatch):
    for name, state in (("LITTLE_DISK", "warning"), ("NO_DISK", "error")):
        monkeypatch.setattr(doctor, name, 10**18)
        first = next(doctor._folders())
        assert (first.state, first.remedy) == (
            state,
            "make room there, or work in a folder of your own",
        )


def test_two_gpus_are_tried_over_nccl_and_what_ails_it_is_a_warning(monkeypatch):
    assert list(doctor._pair_of_gpus()) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # none is here: it has to fail
    (finding,) = doctor._pair_of_gpus()
    assert (finding.what, finding.state) == ("two GPUs", "warning")
    assert re.search("nccl", finding.found, re.IGNORECASE), finding.found
    assert "NCCL_DEBUG=INFO" in finding.remedy
    monkeypatch.setattr(doctor, "PAIR", "import sys; sys.exit(sys.argv[3] != 'nccl')")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    (finding,) = doctor._pair_of_gpus()
    assert (finding.state, finding.found) == ("ok", "have added their numbers up (NCCL 2.28.3)")


def test_a_gpu_of_another_make_is_named(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    first, cpu = doctor._devices()
    assert (first.state, "(mps) is not used" in first.found, cpu.what) == ("warning", True, "cpu")


def test_bf16_that_a_gpu_emulates_is_not_exchanged_for_what_cannot_be_trained_in(monkeypatch):
    monkeypatch.setattr(doctor, "_product_error", lambda device: 0.003)
    monkeypatch.setattr(loading, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    (finding,) = doctor._bfloat16()
    assert (finding.state, "emulated" in finding.found) == ("warning", True)
    assert finding.remedy.startswith("set base.dtype to float32")
    assert "float16" not in finding.remedy
