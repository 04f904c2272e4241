"""A run's drawings: the right numbers, the same file each time, and only what there is."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from san.adapted import adapt
from tiny import rows, tiny_model, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from san_llm.errors import InputError
from san_llm.look.figures import as_png, as_svg
from san_llm.look.numbers import numbers_of
from san_llm.look.plots import draw, figures
from san_llm.look.terminal import sparkline
from san_llm.protocol.tasks import TASKS, guessing
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run

LOG = [
    {"step": 1, "loss": 2.5, "learning_rate": 0.0},
    {"step": 2, "loss": None, "learning_rate": 0.01},
    {"step": 3, "loss": 0.5, "learning_rate": 0.005},
    {"step": 3, "eval_loss": 0.75},
]
ALL = ["loss", "gamma", "distribution", "synapse", "scores"]


def results(adapter, *accuracies, data="pocket"):
    tasks = [
        {"task": task, "n": 4, "accuracy": accuracy, "standard_error": 0.25, "unparseable": 1}
        for task, accuracy in zip(("boolq", "a$^{b}$_c"), accuracies, strict=True)
    ]
    average = {"accuracy": sum(accuracies) / 2, "standard_error": 0.2}
    about = {"model": "m", "data": data, "limit": 4, "protocol": "generate", "prompt": "alpaca"}
    return about | {"strict": False, "adapter": adapter, "tasks": tasks, "average": average}


@pytest.fixture
def run(here, tiny_base):
    """Make a run of the tiny base with a log, an adapter and evaluations, as the stages do."""

    def make(name="run", adapter=True, **options):
        recipe = write_recipe(here / "mine.yaml", tiny_base, write_rows(here / "r.json", rows(8)))
        folder = new_run(load_recipe(recipe), Path("runs") / name, False)
        lines = [json.dumps(entry) for entry in LOG]
        (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
        if adapter:
            base = AutoModelForCausalLM.from_pretrained(tiny_base)
            adapt(base, **options).save_pretrained(folder / "adapter")
        for number, found in enumerate(
            [
                results(None, 0.25, 0.5),
                results(None, 0.0, 0.0, data="other"),
                results("it", 0.75, 1.0),
            ]
        ):
            evaluation = folder / "eval" / str(9 - number)  # its date counts, not its name
            evaluation.mkdir(parents=True)
            (evaluation / "results.json").write_text(json.dumps(found))
            (evaluation / "manifest.json").write_text(json.dumps({"made": f"2026-01-0{number}"}))
        return folder

    return make


def test_what_is_drawn_is_what_the_files_say(run):
    folder = run()
    numbers = numbers_of(folder)
    assert (numbers.train_loss.steps.tolist(), numbers.train_loss.values.tolist()) == (
        [1, 3],
        [2.5, 0.5],
    )
    assert numbers.held_out_loss.values.tolist() == [0.75]
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(numbers.gammas) == len(saved) == 28
    for name, gamma in numbers.gammas.items():
        assert np.array_equal(gamma, saved[f"base_model.model.{name}.san_gamma"].double())
    average = numbers.scores.tasks[-1]
    assert (average.task, average.before, average.after) == ("average", (0.375, 0.2), (0.875, 0.2))
    assert numbers.scores.no_answer == (2, 2)
    # A task of other people's has no known chance, and so has no average over it.
    assert [task.guessing for task in numbers.scores.tasks] == [0.5, None, None]
    assert numbers.left_out == ()


@pytest.mark.parametrize("options", [{}, {"mode": "synapse"}, {"carrier": "dora", "r": 4}])
def test_the_synapse_scale_is_what_the_merge_multiplies_by(run, options):
    folder = run(**options)
    scale = numbers_of(folder, "1.o_proj").synapse
    gammas = numbers_of(folder).gammas
    assert scale.module == "model.layers.1.self_attn.o_proj"
    v = gammas["model.layers.1.self_attn.v_proj"]
    head = len(v) // 2  # two kv heads, each read by two query heads
    assert np.array_equal(scale.s, np.concatenate([v[:head], v[:head], v[head:], v[head:]]))
    own = gammas.get(scale.module)
    rows_left_alone = options.get("mode") == "synapse"
    assert np.array_equal(scale.gamma, np.ones(32) if rows_left_alone else own)


def test_a_column_scale_of_its_own_is_drawn_as_such(run):
    folder = run(links="free")
    numbers = numbers_of(folder, "0.q_proj")  # to which no link leads
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    held = saved[f"base_model.model.{numbers.synapse.module}.san_sigma"]
    assert numbers.synapse.anterior is None
    assert np.array_equal(numbers.synapse.s, held.double())
    assert numbers.left_out == ()
    drawn = draw(folder, "0.q_proj")
    assert list(drawn) == ALL
    assert "s: its own" in [axis.get_ylabel() for axis in drawn["synapse"].axes]


def test_every_drawing_is_one_element_without_an_address_and_the_same_each_time(run):
    folder = run()
    once, again = draw(folder), draw(folder)
    assert list(once) == ALL
    for name, figure in once.items():
        svg = as_svg(figure)
        assert svg == as_svg(figure) == as_svg(again[name]), name
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg")
        assert root[0].text == figure.get_suptitle() != ""
        links = [value for e in root.iter() for key, value in e.attrib.items() if "href" in key]
        assert all(link.startswith(("#", "data:")) for link in links), name
        assert not re.search(r"20\d\d-\d\d-\d\d", svg)
        assert as_png(figure).startswith(b"\x89PNG")


def test_the_scores_are_drawn_beside_guessing(run):
    axis = draw(run())["scores"].axes[0]
    (marks,) = (lines for lines in axis.collections if lines.get_label() == "guessing")
    (line,) = marks.get_segments()
    assert line[:, 0].tolist() == [50, 50]  # boolq's, in its row
    assert line[:, 1].mean() == pytest.approx(2)
    assert guessing(TASKS) == pytest.approx(0.354, abs=1e-3)


def test_titles_say_what_is_seen(run):
    titles = {name: figure.get_suptitle() for name, figure in draw(run(), "1.o_proj").items()}
    assert titles["loss"] == (
        "Training loss went from 2.5 to 0.5 in 3 steps; held-out at best 0.75"
    )
    assert titles["scores"] == "87.5 % right over 2 tasks, where the base has 37.5 %"
    assert titles["synapse"].startswith("o of block 1: ")


def test_the_map_shows_each_modules_mean_in_its_cell(run):
    folder = run()
    gammas = numbers_of(folder).gammas
    panels = [axis for axis in draw(folder)["gamma"].axes if axis.get_title()]
    assert len(panels) == 4
    shown = {panel.get_title().splitlines()[0]: panel.images[0].get_array() for panel in panels}
    down = gammas["model.layers.2.mlp.down_proj"]
    assert shown["mean \N{GREEK SMALL LETTER GAMMA}"][2, 6] == pytest.approx(down.mean())
    assert shown["distance from 1:"][2, 6] == pytest.approx(np.abs(down - 1).mean())
    assert shown["LTP: channels"][2, 6] == pytest.approx(100 * (down > 1).mean())


def test_an_adapter_at_its_start_and_one_of_two_modules_are_drawn(run):
    from san_llm import SanConfig

    folder = run(adapter=False)
    for options in ({}, {"target_modules": ["q_proj", "v_proj"]}):
        get_peft_model(tiny_model(), SanConfig(**options)).save_pretrained(folder / "adapter")
        drawn = draw(folder)
        assert list(drawn) == (["loss", "gamma", "distribution", "scores"] if options else ALL)
        for figure in drawn.values():
            as_png(figure)


def test_what_a_run_does_not_have_is_said(run, tmp_path):
    unfinished = run("unfinished", adapter=False)
    assert list(draw(unfinished)) == ["loss", "scores"]
    assert "was not finished" in numbers_of(unfinished).left_out[0]
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        unfinished / "adapter"
    )
    assert list(draw(unfinished)) == ["loss", "scores"]
    assert "a LORA adapter: only SAN's have neuron scales" in numbers_of(unfinished).left_out[0]
    moved = run("moved")
    text = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(re.sub("(?m)^  model: .*$", "  model: no/where", text))
    assert list(draw(moved)) == ["loss", "gamma", "distribution", "scores"]
    assert numbers_of(moved).left_out[0].startswith("synapse scale: no/where")


def test_a_low_rank_carrier_without_its_base_has_no_scales(run):
    folder = run(carrier="lora", r=4)
    assert list(draw(folder)) == ALL
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(re.sub("(?m)^  model: .*$", "  model: no/where", text))
    assert list(draw(folder)) == ["loss", "scores"]
    assert "no/where is not on this machine" in numbers_of(folder).left_out[0]


@pytest.mark.parametrize("weight", ["1.o_pro", "9.o_proj", "o_proj", ""])
def test_a_weight_that_is_not_there_is_refused(run, weight):
    with pytest.raises(InputError, match=r"such as 0\.o_proj"):
        numbers_of(run(), weight)


def test_the_command_draws_and_writes_whole_folders_only(run, command, here):
    folder = run()
    done = command("show", folder)
    assert (done.returncode, done.stderr) == (0, "")
    files = [f"{name}.{kind}" for name in ALL for kind in ("png", "svg")]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == sorted(files)
    assert done.stdout.splitlines()[-10:] == [str(folder / "plots" / file) for file in files]
    for part in ("training loss", "down_proj", "a$^{b}$_c", "75.0 ± 25.0"):
        assert part in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    again = command("show", folder)
    assert (again.returncode, again.stdout) == (2, "")
    assert "add --overwrite" in again.stderr
    told = json.loads(command("show", folder, "--overwrite", "--json").stdout)
    assert [Path(file).name for file in told["files"]] == files
    (folder / "plots" / "mine.txt").write_text("kept")
    refused = command("show", folder, "--overwrite")
    assert refused.returncode == 2
    assert "mine.txt" in refused.stderr
    assert (folder / "plots" / "mine.txt").read_text() == "kept"


def test_without_matplotlib_one_line_says_how_to_get_it(run, command, monkeypatch):
    folder = run()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as an import finds it absent
    with pytest.raises(InputError, match="pip install"):
        figures(numbers_of(folder))
    done = command("show", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: drawings need matplotlib: `pip install 'san-llm[plots]'` gets it\n"
    )
    there = command("show", folder, "--terminal")
    assert there.returncode == 0
    assert "training loss" in there.stdout
    assert not (folder / "plots").exists()


def test_a_run_with_nothing_in_it_draws_nothing(run, command):
    folder = run(adapter=False)
    (folder / "log.jsonl").unlink()
    for file in folder.glob("eval/*/results.json"):
        file.unlink()
    done = command("show", folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing to draw yet: losses: no step")
    assert not (folder / "plots").exists()


def test_bars_are_as_high_as_their_numbers():
    assert sparkline(np.array([0.0, 0.5, 1.0, np.nan]), 0, 1, 9) == "▁▅█ "
    assert sparkline(np.array([0.0, 0.0, 1.0, 1.0]), 0, 1, 2) == "▁█"
    assert sparkline(np.array([3.0, 3.0]), 3, 3, 2) == "▁▁"
