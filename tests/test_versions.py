"""The versions that the package allows, against what is installed and what is tested."""

import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def required() -> list[Requirement]:
    """Return what the package asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"]]


def pinned(file: str) -> dict[str, str]:
    """Return the versions in a file of constraints, by the packages' names."""
    pins = (line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): pin.strip() for name, pin in pins}


def test_what_is_installed_is_within_the_bounds_of_the_package():
    for requirement in required():
        installed = version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), requirement


def test_the_lowest_set_is_at_the_lower_bounds_and_the_usual_one_within_them():
    lowest, usual = pinned("constraints-lowest.txt"), pinned("constraints.txt")
    for requirement in required():
        name = canonicalize_name(requirement.name)
        (low,) = (one.version for one in requirement.specifier if one.operator == ">=")
        assert requirement.specifier.contains(usual[name]), requirement
        if name == "torch":  # of which there are small builds, for CPUs alone, for some versions
            assert requirement.specifier.contains(lowest[name])
        else:
            assert Version(lowest[name]) == Version(low), (
                f"{name} {lowest[name]} is tested, {low} is allowed"
            )
