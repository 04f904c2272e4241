"""What does a merge cost: time and peak memory of whole processes, against PEFT and ``cp``.

``python benchmarks/merge.py --model models/smollm2-135m`` merges a random SAN adapter three ways,
in turns: ``san-llm merge``; PEFT's merge_and_unload and save_pretrained in one process; and ``cp``
of the weights and ``sync`` of the copies. ``--blocks N`` makes a LLaMA-3-8B-shaped base of N blocks
instead, with small random weights, in a temporary folder. The base is in the page cache. Before
each process is a pause: what the last one's files took in the page cache is given back to a virtual
machine's host within seconds, and who writes before that finds memory for half the price.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measured import write_results

PEFT = """
import sys, torch, transformers, peft, san_llm
from san_llm import SanConfig
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
CP = """
import subprocess, sys
from pathlib import Path
base, _, out = map(Path, sys.argv[1:])
out.mkdir()
subprocess.run(["cp", *base.glob("*.safetensors"), out], check=True)
subprocess.run(["sync", *out.glob("*.safetensors")], check=True)
"""
PEAK = """
import atexit
status = "/proc/self/status"
atexit.register(lambda: print(open(status).read().split("VmHWM:")[1].split()[0]))
"""
SAN = """
import sys
from san_llm.cli import app
base, adapter, out = sys.argv[1:]
app(["merge", "--adapter", adapter, "--model", base, "--output", out])
"""


def synthetic(folder: Path, blocks: int) -> None:
    """Write a LLaMA-3-8B-shaped checkpoint of some blocks, one file a block."""
    import numpy as np
    from transformers import LlamaConfig

    from san_llm.architectures.sizes import linear_shapes
    from san_llm.merge.write import Output, write_weights

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
    )
    shapes = {"model.embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096)}
    for block in range(blocks):
        name = f"model.layers.{block}"
        for linear, shape in linear_shapes(config.to_dict()).items():
            parent = "self_attn" if linear[0] in "qkvo" else "mlp"
            shapes[f"{name}.{parent}.{linear}.weight"] = shape
        shapes[f"{name}.input_layernorm.weight"] = (4096,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (4096,)
    shapes["model.norm.weight"] = (4096,)
    noise = np.random.default_rng(0).normal(scale=0.02, size=2**24).astype(np.float32)

    def rows(shape: tuple[int, ...]):
        width = int(np.prod(shape[1:]))

        def read(zeros: np.ndarray, first: int, last: int) -> np.ndarray:
            start = first * width % (2**24 - (last - first) * width)
            return noise[start : start + (last - first) * width].reshape(-1, *shape[1:]).copy()

        return read

    outputs = [Output(n, "BF16", shape, None, rows(shape)) for n, shape in shapes.items()]
    folder.mkdir()
    write_weights(folder, outputs, 5 * 10**9, lambda size: None)
    config.save_pretrained(folder)


def random_adapter(base: Path, folder: Path) -> None:
    """Save a SAN adapter of a base's shape, its scales around 1."""
    import numpy as np
    from safetensors.numpy import save_file

    from san_llm.san.config import SanConfig
    from san_llm.san.graph import propagation_graph

    graph = propagation_graph(json.loads((base / "config.json").read_text()))
    dice = np.random.default_rng(1)
    save_file(
        {
            f"base_model.model.{node.name}.san_gamma": dice.normal(1, 0.1, node.d_out).astype("f4")
            for node in graph
        },
        folder / "adapter_model.safetensors",
    )
    SanConfig(base_model_name_or_path=str(base), task_type="CAUSAL_LM").save_pretrained(folder)


def measure(code: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Run one merge as a process; return seconds, CPU seconds and its peak memory in MB."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, str(base), str(adapter), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return {
        "seconds": seconds,
        "cpu_seconds": sum(after[:2]) - sum(before[:2]),
        "peak_mb": int(done.stdout.split()[-1]) * 1024 / 1e6,
        "load": os.getloadavg()[0],
    }


def content(folder: Path) -> str:
    """Return one sha256 over every tensor's name, dtype, shape and bytes."""
    from san_llm.models.weights import read_weights

    digest = hashlib.sha256()
    for tensor in sorted(read_weights(folder), key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            for left in range(tensor.size, 0, -(2**20)):
                digest.update(file.read(min(left, 2**20)))
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--blocks", type=int, help="of a synthetic base instead")
    parser.add_argument("--methods", nargs="+", default=["san-llm", "peft", "cp"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=10, help="seconds before each process")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    codes = {"san-llm": SAN, "peft": PEFT, "cp": CP}
    by_method: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    contents: set[str] = set()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        base = options.model.resolve()
        if options.blocks:
            base = folder / "base"
            synthetic(base, options.blocks)
        adapter = folder / "adapter"
        adapter.mkdir()
        random_adapter(base, adapter)
        for _ in range(options.rounds):
            for method in options.methods:
                out = folder / "out"
                time.sleep(options.pause)
                by_method[method].append(measure(codes[method], base, adapter, out))
                print(f"{method}: {by_method[method][-1]}", file=sys.stderr)
                if method != "cp":
                    contents.add(content(out))
                shutil.rmtree(out)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    rows = []
    for method, runs in by_method.items():
        seconds = [run["seconds"] for run in runs]
        rows.append(
            {
                "method": method,
                "seconds": statistics.median(seconds),
                "spread": max(seconds) - min(seconds),
                "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
                "load": max(run["load"] for run in runs),
                "peak_mb": max(run["peak_mb"] for run in runs),
            }
        )
    print(f"{size / 1e9:.2f} GB of weights\n")
    print("| method | seconds (spread) | CPU s | load | peak MB |\n| --- | --: | --: | --: | --: |")
    for row in rows:
        print(
            f"| {row['method']} | {row['seconds']:.2f} ({row['spread']:.2f}) "
            f"| {row['cpu_seconds']:.2f} | {row['load']:.1f} | {row['peak_mb']:.0f} |"
        )
    same = (
        len(contents) == 1 if {"san-llm", "peft"} <= set(by_method) else None
    )  # else nothing beside
    if same is not None:
        print(f"\nmerged tensors {'the same bit for bit' if same else 'DIFFERENT'}")
    write_results(options, ("rounds", "pause"), bytes=size, rows=rows, same_bits=same)


if __name__ == "__main__":
    main()
