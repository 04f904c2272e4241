"""The promises of SECURITY.md that are kept by what does not happen."""

import json
from pathlib import Path

import torch
from bad_inputs.building import Bomb
from tiny import rows, save_tiny, write_recipe, write_rows

SECRET = "hf_0123456789abcdefghijABCDEFGHIJ"


def test_nothing_pickled_is_loaded_no_code_runs_and_no_token_is_written(here, command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    model = save_tiny(here / "model", num_hidden_layers=1)
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.pth"):
        torch.save({"a": Bomb()}, model / name)
    (model / "evil.py").write_text("import os; os.system('touch pwned')\nclass C: pass\n")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    (model / "config.json").write_text(json.dumps(config))
    write_rows(here / "rows.json", rows(12))
    recipe = write_recipe(here / "mine.yaml", model, here / "rows.json", training={"max_steps": 2})
    done = command("train", recipe)
    assert done.returncode == 0, done.stderr
    run = (here / "runs" / "latest").resolve()
    # A stranger puts pickles into the run as well, where libraries look for them.
    for folder in (run / "adapter", *(run / "checkpoints").glob("checkpoint-*")):
        for name in ("adapter_model.bin", "training_args.bin"):
            torch.save({"a": Bomb()}, folder / name)
    data = write_rows(here / "data" / "boolq" / "test.json", rows(2)).parents[1]
    done = command("eval", "--tasks", "boolq", "--data", data)
    assert done.returncode == 0, done.stderr
    assert command("diff").returncode == 0
    assert not list(here.rglob("pwned"))
    for file in (path for path in here.rglob("*") if path.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file


def test_every_promise_names_tests_that_exist():
    root = Path(__file__).parents[1]
    cases = (root / "tests" / "bad_inputs" / "building.py").read_text()
    for line in (root / "SECURITY.md").read_text().splitlines():
        for name in line.split("|")[2].split("`")[1::2] if line.startswith("| ") else []:
            known = name.strip("*") in cases or (root / name).exists()
            assert known, name
