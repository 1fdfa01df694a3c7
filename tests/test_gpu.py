"""The library on a GPU that the CPU plays: every tensor where it must be, the same numbers."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from pretend_gpu import GpuTensor, pretend_gpu
from safetensors.torch import load_file
from torch.testing import assert_close

from ddpo_lib import (
    checkpoints,
    encoders,
    guidance,
    inversion,
    policy,
    rewards,
    runs,
    sampler,
)
from ddpo_lib.book import finetuning, paths, profiles

# ------------------------------------------------------------------------------- the pretended GPU


def test_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretend_gpu():
        here, there = torch.ones(3, 4), torch.ones(3, 4, device="cuda")
        assert there.device.type == "cuda" and here.device.type == "cpu"
        for wrong in (
            lambda: here + there,
            lambda: torch.cat([there, here]),
            lambda: torch.where(there > 0, there, here),
            lambda: here[torch.arange(2).to("cuda")],
            lambda: torch.nn.functional.linear(there, torch.ones(2, 4)),
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            lambda: here.add_(there),
        ):
            with pytest.raises(RuntimeError, match="expected"):
                wrong()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert isinstance(there[torch.arange(2)] * torch.tensor(2.0) + 1, GpuTensor)
        assert there.cpu().numpy().sum() == 12 == there.sum().item()
        assert (there.to(here.device) + here).device.type == "cpu"


def test_pretended_gpu_learns_like_the_cpu():
    def train(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.SiLU()
        )
        net.to(device)
        optimizer = torch.optim.AdamW(net.parameters())
        for seed in range(3):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
        return [p.detach().cpu() for p in net.parameters()]

    expected = train("cpu")
    with pretend_gpu():
        assert_close(train("cuda"), expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------- the library


def small_run(tmp_path, monkeypatch, task, where):
    """A run of profile smoke in a folder of its own, in float32 as the pretended GPU has it."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / where)
    return profiles.load("smoke").run("faces", task, bf16=False)


@pytest.mark.parametrize("task", ["compressibility", "aesthetic", "over50"])
@pytest.mark.parametrize("free", [10**10, 1])
def test_finetuning_on_a_gpu_is_that_of_the_cpu(tmp_path, monkeypatch, task, free):
    """With the states on the GPU or, where it has no room for them, on the CPU."""
    homes = [finetuning.finetune(small_run(tmp_path, monkeypatch, task, "cpu"))]
    with pretend_gpu():
        run = small_run(tmp_path, monkeypatch, task, "gpu")
        with mock.patch.object(torch.cuda, "mem_get_info", lambda device=None: (free, free)):
            homes.append(finetuning.finetune(run))
    for here, there in zip(*(runs.metrics(home) for home in homes), strict=True):
        for name in here.keys() - {"seconds", "updates"}:
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-6), name
    weights = [load_file(h / "best/unet/diffusion_pytorch_model.safetensors") for h in homes]
    assert_close(weights[1], weights[0], rtol=0, atol=1e-6)


def test_stopped_run_goes_on_on_a_gpu(tmp_path, monkeypatch):
    with pretend_gpu():
        run = small_run(tmp_path, monkeypatch, "compressibility", "gpu")
        save = checkpoints.save_last

        def stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(checkpoints, "save_last", stop)
        with pytest.raises(KeyboardInterrupt):
            finetuning.finetune(run)
        monkeypatch.setattr(checkpoints, "save_last", save)
        home = finetuning.finetune(run)
    updates = [update["update"] for row in runs.metrics(home)[1:] for update in row["updates"]]
    assert updates == list(range(run.settings.n_updates))


def test_gpu_without_bfloat16_runs_in_float32():
    """A T4 only emulates it."""

    def supported(including_emulation=True):
        return including_emulation

    with pretend_gpu():
        assert policy.load(paths.TOY / "faces").bf16
        with mock.patch.object(torch.cuda, "is_bf16_supported", supported):
            assert not policy.load(paths.TOY / "faces").bf16
            assert policy.load(paths.TOY / "faces", device="cpu").bf16


def test_evaluation_and_what_the_chapters_add_on_a_gpu():
    def score(reward, images):
        prompts = (["an old person"] * len(images),) if rewards.needs_prompts(reward) else ()
        return reward(images, *prompts)

    def everything():
        agent = policy.load(paths.TOY / "faces", bf16=False)
        clip = encoders.load_clip(paths.TOY / "clip")
        x_T = sampler.noise(agent, range(3))
        trajectory = sampler.rollout(agent, x_T, 4, range(3))
        x_0 = sampler.sample(agent, x_T, 4)
        loss = guidance.clip_distance(clip, "an old person")
        guided = guidance.guide(agent, loss, 2.0)
        names = ("clip", "aesthetic", "age")
        models = {name: str(paths.TOY / name) for name in names}
        return {
            "trajectory": trajectory.states,
            "log_probs": trajectory.log_probs,
            "denoised": sampler.denoised(agent, trajectory),
            "inverted": inversion.invert(agent, x_0, 4),
            "guided": sampler.sample(guided, x_T, 4),
            **{name: score(rewards.load(name, models), x_0) for name in rewards.REWARDS},
        }

    expected = everything()
    with pretend_gpu():
        found = everything()
        assert all(value.device.type == "cuda" for value in found.values())
        found = {name: value.cpu() for name, value in found.items()}
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- the notebooks


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")))
def test_notebook_runs_on_a_gpu(root, name):
    done = subprocess.run(
        [sys.executable, "notebook_on_gpu.py", paths.NOTEBOOKS / f"{name}.ipynb", "smoke"],
        cwd=Path(__file__).parent,
        env=os.environ | {"DDPO_ROOT": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
