"""Everything that wants a GPU, in ten minutes: its tests, and a training step of LLaMA-3-8B.

The step is that of ``step.py`` on a model of LLaMA-3-8B's shape with random weights, one row of
2,048 tokens, over bf16 and over 4 bits. Nothing is installed or fetched: what a library that is
missing would do is left out with a word. Rows that come too late are left out as well, the least
wanted last. ``make gpu`` writes ``benchmarks/results_gpu.json`` and ``.md``; ``GPU="--device cpu"``
tries the script itself on a tiny shape.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
METHODS = ("frozen", "san", "lora", "ia3", "dora", "lora-autocast", "dora-autocast")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors")
# What the package cannot be imported without; torch & co. are asked for by name below.
NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "pydantic",
    "yaml",
    "rich",
    "psutil",
)
NAME = "results_gpu.json"
SHAPE = "meta-llama/Meta-Llama-3-8B"
TINY = ("--blocks", "2", "--narrow", "16", "--shape", "1x64", "--steps", "1")


def missing(*modules: str) -> list[str]:
    return [name for name in modules if find_spec(name) is None]


def device_name(device: str) -> str:
    """Return what the device is called, or end with a word where there is none."""
    import torch

    if device == "cpu":
        return f"{platform.machine()}, {os.cpu_count()} cores"
    if not torch.cuda.is_available():
        sys.exit(
            f"no GPU that torch {torch.__version__} sees (built for CUDA {torch.version.cuda}); "
            'GPU="--device cpu" tries the script on a tiny shape'
        )
    return str(torch.cuda.get_device_name(device))


def run_tests(device: str, seconds: float) -> dict[str, Any]:
    """Run the tests that are marked ``gpu``; return how many passed, or why none were run."""
    if absent := missing("pytest", "peft", "datasets", "typer"):
        return {"skipped": f"not installed: {', '.join(absent)}"}
    # Not the project's own settings: they ask for plugins that may not be here.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={ROOT}", "-q", "-ra"]
    command += ["--import-mode=importlib", "-o", f"pythonpath={ROOT / 'tests'}"]
    command += ["-W", "ignore", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "SAN_LLM_GPU": device.partition(":")[0]},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return {"failed": f"not done in {seconds:.0f} s", "said": said[-4000:]}
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-500:]]
    counts = {
        kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])
    }
    facts = {"seconds": time.monotonic() - began, **counts}
    return facts if done.returncode == 0 else facts | {"said": "\n".join(lines)[-8000:]}


def measure(
    options: argparse.Namespace, bits4: bool, deadline: float
) -> tuple[list[Any], dict[str, str]]:
    """Return the rows of a base in bf16 or 4 bits, and why others are not among them."""
    from measured import alone
    from step import child, row_of

    rows: list[Any] = []
    left_out: dict[str, str] = {}
    for method in METHODS:
        absent = missing(*["peft"] * (method != "frozen"), *["bitsandbytes"] * bits4)
        if absent:
            left_out[method] = f"not installed: {', '.join(absent)}"
        elif time.monotonic() > deadline:
            left_out[method] = "no time was left"
        else:
            options.bits4 = bits4
            try:
                found = alone(child(options, method), method, options.threads)
            except SystemExit as failed:  # a method that fails leaves the others theirs
                left_out[method] = str(failed).strip()[-2000:]
            else:
                rows.append(row_of(method, [found]))
        word = left_out.get(method) or f"{rows[-1]['seconds']:.3g} s a step"
        print(
            f"{'4 bits' if bits4 else 'bf16'}, {method}: {word.splitlines()[-1]}", file=sys.stderr
        )
    return rows, left_out


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def as_text(facts: dict[str, Any]) -> str:
    """Return what was found as Markdown."""
    from step import table

    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    tests = ", ".join(f"{v} {k}" for k, v in facts["tests"].items() if k not in ("said", "seconds"))
    lines = [f"{facts['device']}; {versions}.", "", f"Tests: {tests or 'left out'}.", ""]
    for name, found in facts["steps"].items():
        lines += [f"{facts['shape']}, {name}:", "", table(found["rows"], "seconds"), ""]
        lines += [
            f"- {method}: {why.splitlines()[-1]}" for method, why in found["left_out"].items()
        ]
        lines += [""] * bool(found["left_out"])
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON, and .md beside it")
    options = parser.parse_args()
    began = time.monotonic()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(ROOT))
    if absent := missing(*NEEDED):
        sys.exit(f"{sys.executable} lacks {', '.join(absent)}: nothing here can be run without")
    device, tiny = device_name(options.device), options.device == "cpu"
    from step import parsed

    words = ["--random", SHAPE, "--device", options.device, "--dtype", "bfloat16"]
    words += TINY if tiny else ("--shape", "1x2048", "--steps", "5")
    step = parsed(words)
    shape = f"{SHAPE}'s shape" + (f" / {step.narrow}, {step.blocks} blocks" if tiny else "")
    facts: dict[str, Any] = {
        "device": device,
        "versions": {"python": platform.python_version(), **{n: installed(n) for n in PACKAGES}},
        "shape": f"{shape}, {step.shape} tokens, {step.steps} steps",
        "tests": {},
        "steps": {},
    }
    output: Path = options.output or (Path(tempfile.gettempdir()) if tiny else HERE) / NAME
    end = began + 60 * options.minutes
    # Kept as it comes, should the rest be cut off. A row is half a minute.
    for name, bits4, share in (("bf16", False, 0.33), ("4 bits", True, 0.66)):
        rows, left_out = measure(step, bits4, began + share * (end - began) - 15)
        facts["steps"][name] = {"rows": rows, "left_out": left_out}
        output.write_text(json.dumps(facts, indent=2) + "\n")
    if not options.no_tests:
        facts["tests"] = run_tests(options.device, end - time.monotonic())
    output.write_text(json.dumps(facts, indent=2) + "\n")
    text = as_text(facts)
    output.with_suffix(".md").write_text(text)
    print(text)
    tests = facts["tests"]
    if "said" in tests:
        sys.exit(f"tests failed:\n{tests['said']}")
    if any(not found["rows"] for found in facts["steps"].values()):
        sys.exit("nothing was measured of one of the bases: see above")


if __name__ == "__main__":
    main()
