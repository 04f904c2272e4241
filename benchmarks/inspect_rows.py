"""What looking at a large training file costs: ``san-llm data inspect`` as a whole process.

Rows are made of the pocket set's, each with two words swapped and its number in it, so that all are
different, and written as JSONL. Peak memory is that of the process and its children.

``python benchmarks/inspect_rows.py --rows 1000000``
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measured import write_results
from prepare import swapped


def write_rows(path: Path, count: int) -> None:
    """Write ``count`` different rows."""
    from san_llm.data.sources import POCKET

    with path.open("w") as file:
        for number, row in enumerate(swapped(POCKET / "train.json", count)):
            file.write(json.dumps(row | {"instruction": f"{row['instruction']} {number}"}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m", help="whose tokenizer")
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--folder", type=Path, help="where the temporary file goes")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.rows)
        size = path.stat().st_size
        command = [sys.executable, "-m", "san_llm", "data", "inspect", str(path), "--json"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [*command, f"base.model={options.model}"], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    after, inspection = resource.getrusage(resource.RUSAGE_CHILDREN), json.loads(done.stdout)
    result = {
        "bytes": size,
        "seen": inspection["rows"],
        "duplicates": inspection["duplicates"],
        "seconds": seconds,
        "cpu_seconds": sum(after[:2]) - sum(before[:2]),
        "peak_mb": after.ru_maxrss * 1024 / 1e6,
    }
    print(json.dumps(result))
    write_results(options, ("model", "rows"), **result)


if __name__ == "__main__":
    main()
