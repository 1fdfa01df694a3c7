"""The three lists of dependencies agree, and the batch is sound before anything runs."""

import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ddpo_lib import batch, config, paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAME = {"torch": "pytorch"}
# Torch pins these itself, for each platform; setuptools comes with pip.
NOT_PINNED = re.compile(r"nvidia-.*|cuda-.*|triton|pip|setuptools|ddpo-lib")


def declared() -> dict[str, Requirement]:
    texts = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
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
        "help", "reproduce", "test", "lab", "bench", "toy",
    ]  # fmt: skip


def test_batch_runs_every_notebook_with_its_parameters():
    command = [sys.executable, "-m", "snakemake", "-n", "-p", "--forceall", "--nolock"]
    command += ["--cores", "2", "--config", "profile=toy"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    planned = done.stdout + done.stderr
    for run in config.load("toy").batch():
        given = f"-p profile toy -p policy {run.policy} -p task {run.task} -p seed {run.seed} "
        assert f"50_finetune-{run.name}.ipynb {given}" in planned
    for notebook in batch.NOTEBOOKS:
        assert f"notebooks/{notebook}.ipynb -p profile toy " in planned


def test_misspelled_parameter_fails_before_anything_runs(tmp_path, monkeypatch):
    for file in paths.NOTEBOOKS.glob("*.ipynb"):
        notebook = json.loads(file.read_text())
        for cell in notebook["cells"]:
            if file.stem == "50_finetune" and "parameters" in cell["metadata"].get("tags", []):
                source = "".join(cell["source"])
                cell["source"] = re.sub(r"^task\b", "tsak", source, flags=re.MULTILINE)
        (tmp_path / file.name).write_text(json.dumps(notebook))
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    with pytest.raises(ValueError, match=r"50_finetune: unknown parameter \['task'\].*tsak"):
        batch.plan("toy", cores=2)


def test_missing_notebook_fails_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        batch.plan("toy", cores=2)


def test_plan_knows_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    runs = config.load("toy").batch()
    complete, half_way, foreign = (tmp_path / "toy" / run.name for run in runs[:3])
    for home, run in zip((complete, half_way, foreign), runs, strict=False):
        (home / "last").mkdir(parents=True)
        n = 4 if home == half_way else run.settings.n_iterations
        (home / "last" / "state.json").write_text(json.dumps({"iterations_done": n}))
        made = config.replace(run, eta=0.5) if home == foreign else run
        (home / "settings.json").write_text(json.dumps(dataclasses.asdict(made)))
        if home != half_way:
            (home / "evaluation.json").write_text("{}")

    before, *states, last = batch.plan("toy", cores=2).splitlines()

    assert f"{len(runs)} finetunings" in before
    assert re.search(r"about \d+ minutes on 2 cores", last)
    assert states[0].endswith(" done")
    assert "goes on after 4 of" in states[1]
    assert "to do again, eta 0.5 → 1.0" in states[2]
    assert not (foreign / "evaluation.json").exists()
    assert (complete / "evaluation.json").exists()


def test_time_is_shared_among_cores():
    profile = config.load("toy")
    runs = profile.batch()
    one, two = (batch.seconds(profile, runs, batch.NOTEBOOKS, cores=n) for n in (1, 2))
    assert one / 2 <= two < one
