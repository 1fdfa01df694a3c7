"""The whole batch of profile thesis, on small models that stand in for the Hub's."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from ddpo_lib.book import batch, paths, profiles

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path):
    """A checkout whose profile thesis has the toy models under another name, and small counts."""
    for folder in ("ddpo_lib", "config", "notebooks", "data/thesis", "data/toy"):
        shutil.copytree(paths.ROOT / folder, tmp_path / folder)
    shutil.copytree(paths.TOY, tmp_path / "data" / "hub")
    profile = yaml.safe_load((paths.CONFIG / "thesis.yaml").read_text())
    profile |= {
        "policies": {"faces": "hub/faces", "churches": "hub/churches"},
        "models": {"clip": "hub/clip", "aesthetic": "hub/aesthetic", "age": "hub/age"},
        "evaluation": {"n": 60, "n_steps": 10},
        "finetuned": {},
    }
    profile["finetune"] |= {"n_samples": 20, "n_steps": 10, "n_development": 16}
    for task in profile["tasks"].values():
        task["n_iterations"] = 2
    (tmp_path / "config" / "thesis.yaml").write_text(yaml.safe_dump(profile))
    return tmp_path


def test_every_notebook_runs_where_no_picture_has_known_factors(root):
    command = [sys.executable, "-m", "snakemake", "-s", paths.ROOT / "Snakefile", "--cores", "2"]
    command += ["--config", "profile=thesis", "--nolock", "--keep-going", "--quiet"]
    programs = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PYTHONPATH": str(root), "PATH": programs}
    env.pop("MPLBACKEND", None)  # the kernel's own, which shows figures in the notebook
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    thesis = profiles.load("thesis")
    declared = {file for entry in batch.contents().values() for file in entry.files(thesis)}
    assert declared == {file.name for file in (root / "figures" / "thesis").iterdir()}
