"""Every mode, carrier, set of links or none but free, shift and embedding, through the command.

Each merged weight is compared with the dense reference, which shares no code with the package, and
each merge is looked at by the command itself, as every merge is.
"""

import json
from copy import deepcopy
from itertools import chain, combinations, product
from pathlib import Path

import pytest
import torch
from reference import ALL_LINKS, dense_parameters, low_rank_parameters, trained_tensors
from safetensors.torch import load_file
from san.adapted import adapt, columns, vectors
from tiny import tiny_model, tiny_tokenizer

LINKS = list(chain.from_iterable(combinations(ALL_LINKS, n) for n in range(len(ALL_LINKS) + 1)))
CARRIERS = {
    "scale": {},
    "scale and shift": {"shift": True},
    "lora": {"carrier": "lora", "r": 2, "lora_alpha": 3},
    "dora": {"carrier": "dora", "r": 2, "lora_alpha": 3},
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of two blocks with biases, and its folder; tied: an adapted embedding unties it."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **SIZES)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model, folder


def expected(plain, adapted, carrier, mode, links, embedding):
    """Return every weight of the merged model, by the dense reference."""
    result = dict(plain.state_dict())
    options = {"mode": mode, "links": links}
    if CARRIERS[carrier].get("r"):
        moved = low_rank_parameters(
            plain, trained_tensors(adapted), carrier=carrier, c=3 / 2, **options
        )
    else:
        options |= {"adapt_embedding": embedding, "sigmas": columns(adapted)}
        moved = dense_parameters(plain, *vectors(adapted), **options)
    return result | moved


@pytest.mark.parametrize(
    "links",
    [*LINKS, "free"],
    ids=lambda links: links if isinstance(links, str) else "+".join(links) or "no links",
)
def test_every_weight_is_that_of_the_dense_reference(command, base, links):
    plain, folder = base
    for number, (carrier, mode, embedding) in enumerate(
        product(CARRIERS, ("both", "neuron", "synapse"), (False, True))
    ):
        name = f"{carrier}, {mode}, embedding {embedding}"
        options = {"mode": mode, "links": links, "adapt_embedding": embedding}
        if (mode == "synapse" and not links) or (mode != "both" and links == "free"):
            continue  # refused: nothing would be trained, or only one of the two scales
        adapted = adapt(deepcopy(plain), seed=number, **options, **CARRIERS[carrier])
        adapted.save_pretrained(f"adapter{number}")
        with torch.no_grad():
            wanted = expected(plain, adapted, carrier, mode, links, embedding)
        asked = ("--adapter", f"adapter{number}", "--model", folder, "--output", f"out{number}")
        done = command("merge", *asked, "--json")
        assert done.returncode == 0, (name, done.stderr)
        assert json.loads(done.stdout)["checked"]["apart"] < 1e-5, name
        found = load_file(f"out{number}/model.safetensors")
        untied = embedding and mode != "synapse"
        assert ("lm_head.weight" in found) == untied, name
        config = json.loads(Path(f"out{number}/config.json").read_text())
        assert config["tie_word_embeddings"] is not untied, name
        for key, weight in found.items():
            apart = (weight - wanted[key]).abs().max()
            assert apart <= 2e-6 * wanted[key].abs().max(), (name, key)
        assert set(wanted) - set(found) == (set() if untied else {"lm_head.weight"}), name
