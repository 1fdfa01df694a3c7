"""Tiny models, own rewards and throw-away folders that the tests share."""

import os
import sys
import types

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # exact tests run on the CPU
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from ddpo_lib import paths
from ddpo_lib import policy as policies
from ddpo_lib.config import Finetune, Models, Run
from ddpo_lib.policy import Policy

torch.set_num_threads(1)  # faster for tiny tensors, and parallel workers leave each other alone


@pytest.fixture
def new_policy():
    """new_policy(seed=0, bf16=False, clip_sample=True, channels=3, widths=(8, 16)): random
    weights, pictures of 8x8 pixels."""

    def make(seed=0, bf16=False, clip_sample=True, channels=3, widths=(8, 16)) -> Policy:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet = UNet2DModel(
                sample_size=8,
                in_channels=channels,
                out_channels=channels,
                block_out_channels=widths,
                layers_per_block=1,
                norm_num_groups=4,
                add_attention=False,
                down_block_types=("DownBlock2D",) * len(widths),
                up_block_types=("UpBlock2D",) * len(widths),
            ).eval()
        return Policy(unet, DDPMScheduler(1000, clip_sample=clip_sample), bf16)

    return make


@pytest.fixture
def policy(new_policy) -> Policy:
    return new_policy()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project folder whose runs and figures are the tests' own, for DDPO_ROOT."""
    root = tmp_path_factory.mktemp("project")
    (root / "data").mkdir()
    for name in ("config", "notebooks", "data/toy", "data/thesis"):
        (root / name).symlink_to(paths.ROOT / name)
    return root


class Brightness:
    """The mean of the pixels. Counts its calls, and can be told to misbehave at one of them."""

    def __init__(self):
        self.calls = 0
        self.fail_at = None
        self.nan_at = None
        self.script = None

    def __call__(self, images):
        call, self.calls = self.calls, self.calls + 1
        if call == self.fail_at:
            raise KeyboardInterrupt
        values = images.mean((1, 2, 3))
        if call == self.nan_at:
            values[1] = torch.nan
        return values if self.script is None else values + self.script[call]


@pytest.fixture
def brightness(monkeypatch) -> Brightness:
    """The reward named "own_rewards:brightness" while the test runs."""
    module = types.ModuleType("own_rewards")
    module.brightness = Brightness()
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    return module.brightness


@pytest.fixture
def new_run(tmp_path, monkeypatch, new_policy, brightness):
    """new_run(seed=0, **settings): a finetuning of a tiny policy that takes half a second."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    source = tmp_path / "pretrained"
    policies.save(new_policy(widths=(8,)), source)

    def make(seed=0, **settings) -> Run:
        small = {
            "n_iterations": 3,
            "n_samples": 4,
            "n_steps": 3,
            "minibatch_size": 2,
            "micro_batch": 3,
            "n_development": 2,
            "learning_rate": 1e-3,
            "peak_learning_rate": 3e-3,
            "bf16": False,
        }
        return Run(
            profile="test",
            policy="tiny",
            source=str(source),
            task="brighter",
            reward="own_rewards:brightness",
            seed=seed,
            models=Models("no-clip", "no-aesthetic", "no-age"),
            settings=Finetune(**small | settings),
        )

    return make
