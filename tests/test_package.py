"""What is handed on as a package: a wheel that is complete, a licence, a citation."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

from san_llm import __version__

ROOT = Path(__file__).resolve().parents[1]


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a ``wheel`` or an ``sdist``."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    pytest.importorskip("hatchling")
    return build("wheel", ROOT, tmp_path_factory.mktemp("dist"))


def test_the_wheel_has_recipes_schema_pocket_data_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        head = HeaderParser().parsestr(archive.read(about).decode())
    for folder, inside in (("recipes", "recipe/shipped"), ("san_llm/data/pocket", "data/pocket")):
        for path in (ROOT / folder).rglob("*.*"):
            assert f"san_llm/{inside}/{path.relative_to(ROOT / folder)}" in names
    assert {"san_llm/look/page.html", "san_llm/look/page.css"} <= names
    assert {"san_llm/protocol/neutral.txt", "san_llm/protocol/neutral.md"} <= names
    assert f"san_llm-{__version__}.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if name.startswith(("tests", "scripts", "benchmarks"))]
    assert (head["Name"], head["Version"]) == ("san-llm", __version__)
    assert head["License-Expression"] == "Apache-2.0"
    assert head["Description-Content-Type"] == "text/markdown"


def test_the_source_archive_makes_the_same_wheel_and_both_may_be_uploaded(wheel, tmp_path):
    pytest.importorskip("twine")
    archive = build("sdist", ROOT, tmp_path)
    checked = [sys.executable, "-m", "twine", "check", "--strict", archive, wheel]
    done = subprocess.run(checked, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    source = tmp_path / f"san_llm-{__version__}"
    for part in ("tests/conftest.py", "docs/method.md", "examples/demo.py", "mkdocs.yml"):
        assert (source / part).is_file()
    again = build("wheel", source, tmp_path / "again")
    assert contents(again) == contents(wheel)


def contents(wheel: Path) -> dict[str, int]:
    """Return the name and CRC of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


@pytest.mark.slow
def test_what_is_installed_from_the_wheel_works_away_from_the_checkout(wheel, here):
    # An environment of its own, which borrows this one's libraries, but not its san-llm.
    venv.create("env", with_pip=False, symlinks=True)
    python = here / "env" / "bin" / "python"
    site = next((here / "env").glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:  # all that an installer does with a pure wheel
        archive.extractall(site)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    assert Path(run("-c", "import san_llm; print(san_llm.__file__)").strip()).is_relative_to(site)
    command = ("-m", "san_llm")
    assert run(*command, "--version") == f"san-llm {__version__}\n"
    assert "smollm2_demo" in run(*command, "recipes", "list")
    run(*command, "recipes", "copy", "smollm2_demo", "mine.yaml")
    address = (site / "san_llm" / "recipe" / "shipped" / "recipe.schema.json").as_uri()
    assert address in Path("mine.yaml").read_text()
    assert Path(address.removeprefix("file://")).is_file()
    assert run(*command, "recipes", "check", "mine.yaml") == "mine.yaml: ok\n"
    script = "from san_llm.data.sources import POCKET, read_rows; "
    assert int(run("-c", script + "print(len(read_rows(POCKET / 'train.json')))")) > 100


def test_the_citation_names_this_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["title"], cited["version"]) == ("san-llm", __version__)
    paper = cited["preferred-citation"]
    assert paper["url"].endswith("/2409.06706")
    assert len(paper["authors"]) == 10
    assert (ROOT / "LICENSE").read_text().split()[:2] == ["Apache", "License"]
