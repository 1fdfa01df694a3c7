"""Two processes finetune as one does."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpo_lib import disk, parallel, runs
from ddpo_lib import finetune as loop
from ddpo_lib import policy as policies
from ddpo_lib.settings import Finetune

# Of some mini-batches one of the two processes has no sample; the development shares differ.
SETTINGS = {
    "n_iterations": 2,
    "n_samples": 6,
    "n_steps": 4,
    "minibatch_size": 2,
    "n_inner_epochs": 2,
    "micro_batch": 4,
    "n_development": 3,
    "learning_rate": 1e-4,
    "bf16": False,
}

REWARD = '''
import os

def brightness(images):
    return images.mean((1, 2, 3))

def broken(images):
    """For the rollouts of the second process alone; its part of the development set is smaller."""
    wrong = os.environ["RANK"] == "1" and len(images) == 3
    return brightness(images) / (0 if wrong else 1)
'''

CHILD = """
import json, pathlib, sys
import torch
import own_reward
from ddpo_lib import parallel, policy
from ddpo_lib.finetune import finetune
from ddpo_lib.settings import Finetune

torch.set_num_threads(1)
root, settings = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
assert parallel.n_processes() == 2
rank = parallel.share(2).start
assert parallel.is_main() == (rank == 0)
seen = []


def run(name, reward=own_reward.brightness, **changes):
    start = policy.load(root / "pretrained", "cpu", bf16=False)
    return finetune(start, reward, "ddpo", Finetune(**settings | changes), root / name,
                    on_iteration=lambda row: seen.append(row["iteration"]))


# What a process sums, gathers and takes from the main one.
assert parallel.everywhere({"rank": rank}) == {"rank": 0}
assert parallel.gather(torch.arange(rank, 3)).tolist() == [0, 1, 2, 1, 2]
assert parallel.add({"a": rank + 1.0, f"only {rank}": 5.0}) == {"a": 3, "only 0": 5, "only 1": 5}
weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1))]
if rank == 0:  # the other had no sample in this mini-batch
    weights[0].grad = torch.arange(6.0).view(2, 3)
weights[1].grad = torch.tensor([float(rank + 1)])
parallel.sum_gradients(weights)
assert weights[0].grad.equal(torch.arange(6.0).view(2, 3)) and weights[1].grad.item() == 3

# Stopped after an iteration, and gone on with.
run("two", n_iterations=1)
run("two")
assert run("two") == root / "two"
assert seen == ([1, 2] if rank == 0 else [])


def refusal(name, **changes):
    try:
        run(name, **changes)
    except Exception as error:
        return [type(error).__name__, str(error)]


refusals = {"other settings": refusal("two", eta=0.5), "held": refusal("held")}
(root / f"refusals-{rank}.json").write_text(json.dumps(refusals))
parallel.wait()
run("broken", own_reward.broken)
"""


def test_two_processes_finetune_as_one_does(tmp_path, new_policy, monkeypatch):
    (tmp_path / "own_reward.py").write_text(REWARD)
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    import own_reward

    policies.save(new_policy(widths=(8,)), tmp_path / "pretrained")
    start = policies.load(tmp_path / "pretrained", "cpu", bf16=False)
    one, two = tmp_path / "one", tmp_path / "two"
    loop.finetune(start, own_reward.brightness, "ddpo", Finetune(**SETTINGS), one)

    with disk.locked(tmp_path / "held"):
        errors, code = torchrun(tmp_path, json.dumps(SETTINGS))

    results = [tmp_path / f"refusals-{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in results), errors[-3000:]
    same_weights(tmp_path, one, two)
    same_records(one, two)
    assert runs.iterations_done(one) == runs.iterations_done(two) == SETTINGS["n_iterations"]

    refusals, others = (json.loads(file.read_text()) for file in results)
    assert refusals == others
    assert refusals["other settings"][0] == "ValueError"
    assert "settings.eta 1.0 → 0.5" in refusals["other settings"][1]
    assert refusals["held"][0] == "RuntimeError"
    assert "held: another process is at work on it" in refusals["held"][1]

    # One that fails alone ends both.
    assert code != 0
    assert "reward 'broken' is not finite" in errors
    assert [row["iteration"] for row in runs.metrics(tmp_path / "broken")] == [0]
    with disk.locked(tmp_path / "broken", limit=1):
        pass


def torchrun(folder, *arguments):
    """On a machine without a GPU its processes talk by gloo, as those of `accelerate launch` do."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "child.py"]
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, str(folder), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        return process.communicate(timeout=120)[1], process.returncode
    except subprocess.TimeoutExpired:
        process.terminate()  # and with it those it has started; a kill would leave them behind
        pytest.fail("the processes wait for each other: " + process.communicate()[1][-3000:])


def same_weights(folder, one, two):
    start, *ends = (
        load_file(home / "unet" / "diffusion_pytorch_model.safetensors")
        for home in (folder / "pretrained", one / "last", two / "last")
    )
    moves = [torch.cat([(end[key] - start[key]).flatten() for key in start]) for end in ends]
    assert moves[0].abs().median() > 1e-4
    torch.testing.assert_close(*moves, rtol=0, atol=1e-6)


def same_records(one, two):
    a, b = (runs.metrics(home) for home in (one, two))
    assert [row["iteration"] for row in b] == [0, 1, 2]
    for mine, theirs in zip(a, b, strict=True):
        assert set(mine) == set(theirs)
        for name in set(mine) - {"updates", "seconds"}:
            np.testing.assert_allclose(theirs[name], mine[name], rtol=1e-4, atol=1e-6, err_msg=name)
        for row, other in zip(mine.get("updates", []), theirs.get("updates", []), strict=True):
            assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
    for before, after in zip(runs.development(one), runs.development(two), strict=True):
        np.testing.assert_allclose(before.astype(float), after.astype(float), atol=1.01)
    assert runs.best(one)["iteration"] == runs.best(two)["iteration"]


# ------------------------------------------------------------------------------- shares


def test_one_process_is_alone():
    assert parallel.n_processes() == 1 and parallel.is_main()
    assert parallel.share(7) == slice(0, 7)
    values = torch.arange(3)
    assert parallel.gather(values) is values
    assert parallel.everywhere(5) == 5 and parallel.add({"a": 2.0}) == {"a": 2.0}


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
