"""Two processes finetune as one does."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ddpo_lib import parallel, paths, runs
from ddpo_lib import policy as policies

# Of some mini-batches one of the two processes has no sample; the development shares differ.
SETTINGS = {
    "n_iterations": 2,
    "n_samples": 6,
    "n_steps": 4,
    "minibatch_size": 2,
    "n_inner_epochs": 2,
    "micro_batch": 4,
    "n_development": 3,
    "learning_rate": 1e-3,
    "bf16": False,
}

REWARD = """
import os, pathlib

def brightness(images):
    pathlib.Path(os.environ["DDPO_ROOT"], f"seen-by-{os.getpid()}").touch()
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def launch(tmp_path, new_policy):
    """launch(n): finetune a tiny policy in n processes; returns the run's folder."""
    policies.save(new_policy(widths=(8,)), tmp_path / "pretrained")
    (tmp_path / "own.py").write_text(REWARD)
    profile = {
        "policies": {"tiny": str(tmp_path / "pretrained")},
        "models": {"clip": "", "aesthetic": "", "age": ""},
        "evaluation": {"n": 4, "n_steps": 3, "seed": 1},
        "finetune": SETTINGS,
        "tasks": {"brighter": {"reward": "own:brightness"}},
    }

    def run(n):
        root = tmp_path / f"root{n}"
        (root / "config").mkdir(parents=True, exist_ok=True)
        (root / "config" / "tiny.yaml").write_text(yaml.safe_dump(profile))
        # On a machine without GPUs this starts processes that talk by gloo.
        launcher = ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={n}", "-m"]
        arguments = ["ddpo_lib.finetune", "tiny", "tiny", "brighter"]
        path = os.pathsep.join([str(tmp_path), str(paths.ROOT)])
        done = subprocess.run(
            [sys.executable, "-m", *(launcher if n > 1 else []), *arguments],
            cwd=tmp_path,
            env=os.environ | {"DDPO_ROOT": str(root), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(list(root.glob("seen-by-*"))) == n
        return root / "data" / "runs" / "tiny" / "tiny-brighter-s0"

    return run


def test_two_processes_make_the_same_updates_as_one(launch, tmp_path):
    one, two = launch(1), launch(2)
    for name in ("metrics.csv", "rewards.csv", "iterations.csv"):
        a, b = (
            pd.read_csv(home / name).drop(columns="seconds", errors="ignore") for home in (one, two)
        )
        pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-5)
    for a, b in zip(runs.development(one), runs.development(two), strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=1.01)
    assert json.loads((two / "last" / "state.json").read_text())["iterations_done"] == 2
    assert json.loads((two / "evaluation.json").read_text())["n"] == 4

    start, *ends = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (tmp_path / "pretrained", one / "last", two / "last")
    )
    moves = [torch.cat([(end[key] - start[key]).flatten() for key in start]) for end in ends]
    assert moves[0].norm() > 0.1
    assert torch.cosine_similarity(*moves, dim=0) > 0.9999


def test_shares_are_all_samples_in_order(monkeypatch):
    for size in (1, 2, 3, 5):
        monkeypatch.setattr(parallel, "n_processes", lambda size=size: size)
        shares = []
        for rank in range(size):
            state = type("State", (), {"process_index": rank})
            monkeypatch.setattr(parallel, "_state", lambda state=state: state)
            shares.append(list(range(7))[parallel.share(7)])
        assert sum(shares, []) == list(range(7))
        assert all(shares)


def test_more_processes_than_samples_are_an_error(monkeypatch):
    monkeypatch.setattr(parallel, "n_processes", lambda: 3)
    with pytest.raises(ValueError, match="2 samples cannot be shared by 3 processes"):
        parallel.share(2)
