"""The three lists of dependencies agree, and the batch is sound before anything runs."""

import importlib.metadata
import re
import subprocess
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ddpo_lib.book import paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAME = {"torch": "pytorch"}
# Torch pins these itself, for each platform; setuptools comes with pip.
NOT_PINNED = re.compile(r"nvidia-.*|cuda-.*|triton|pip|setuptools|ddpo-lib")


def declared() -> dict[str, Requirement]:
    texts = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
    return {canonicalize_name(r.name): r for r in map(Requirement, texts)}


def pinned() -> dict[str, str]:
    lines = (paths.ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def conda() -> dict[str, Requirement]:
    *entries, pip = yaml.safe_load((paths.ROOT / "environment.yml").read_text())["dependencies"]
    entries += [entry for entry in pip["pip"] if entry != "-e ."]
    # A conda range is written like pip's, but for the single "=" of a Python series.
    named = (Requirement(re.sub(r" =(\d.*)", r" ==\1.*", entry)) for entry in entries)
    return {canonicalize_name(r.name): r for r in named}


def test_pins_lie_in_the_ranges():
    pins = pinned()
    for name, requirement in declared().items():
        assert name in pins, f"{name} has no pin in requirements.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement}, but {pins[name]} pinned"


def test_every_pin_is_needed():
    needed, waiting = set(), [(name, frozenset()) for name in declared()]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in needed:
            continue
        needed.add((name, extras))
        try:
            texts = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, texts):
            extra = re.search(r"extra == [\"'](\S+)[\"']", str(requirement.marker))
            if extra is None or extra[1] in extras:
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert set(pinned()) - {name for name, _ in needed} == set()


def test_gpu_libraries_are_left_to_torch():
    assert [name for name in pinned() if NOT_PINNED.fullmatch(name)] == []


def test_conda_environment_agrees():
    expected = {CONDA_NAME.get(name, name): r.specifier for name, r in declared().items()}
    found = {name: r.specifier for name, r in conda().items()}
    python = found.pop("python")
    del found["pip"]
    assert found == expected
    series = str(python).removeprefix("==").removesuffix(".*")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(series)


def test_no_package_index_is_named():
    index = re.compile(r"index[-_]url|find[-_]links|https?://\S+/simple\b", re.IGNORECASE)
    suffixes = {"", ".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cff", ".ipynb"}
    skipped = {"runs", "build", "__pycache__"}
    for file in paths.ROOT.rglob("*"):
        parts = file.relative_to(paths.ROOT).parts
        hidden = parts[0].startswith(".") and parts[0] != ".ci"
        if hidden or skipped & set(parts) or file.suffix not in suffixes or not file.is_file():
            continue
        # This test has to spell out what it looks for.
        if file.name != "test_packaging.py":
            assert not index.search(file.read_text(errors="ignore")), file


def test_make_targets():
    listed = subprocess.run(["make", "help"], cwd=paths.ROOT, capture_output=True, text=True)
    assert re.findall(r"^make (\w+)", listed.stdout, re.MULTILINE) == [
        "help", "reproduce", "seeds", "methods", "text", "book", "test", "lab", "bench", "toy",
    ]  # fmt: skip
