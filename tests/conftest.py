"""Tiny models, own rewards and throw-away folders that the tests share."""

import json
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

from ddpo_lib import finetune as loop
from ddpo_lib.policy import Policy
from ddpo_lib.settings import Finetune

torch.set_num_threads(1)  # faster for tiny tensors, and parallel workers leave each other alone


@pytest.fixture(scope="session")
def new_policy():
    """new_policy(seed=0, bf16=False, channels=3, widths=(8, 16), size=8, **scheduler): random
    weights, images of 8x8 pixels."""

    def make(seed=0, bf16=False, channels=3, widths=(8, 16), size=8, **scheduler) -> Policy:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet = UNet2DModel(
                sample_size=size,
                in_channels=channels,
                out_channels=channels,
                block_out_channels=widths,
                layers_per_block=1,
                norm_num_groups=4,
                add_attention=False,
                down_block_types=("DownBlock2D",) * len(widths),
                up_block_types=("UpBlock2D",) * len(widths),
            ).eval()
        return Policy(unet, DDPMScheduler(1000, **scheduler), bf16)

    return make


@pytest.fixture(scope="session")
def letter_tokenizer():
    """A function of a folder: a CLIPTokenizer, written there, that knows letters and the comma."""
    from transformers import CLIPTokenizer

    def make(folder, **options):
        letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [","]
        words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
        vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), pad_token="<|endoftext|>", **options)

    return make


@pytest.fixture
def policy(new_policy) -> Policy:
    return new_policy()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder for the tests' own runs and figures, for DDPO_ROOT."""
    return tmp_path_factory.mktemp("project")


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
    """What `brightness_reward` consults while the test runs."""
    module = types.ModuleType("own_rewards")
    module.brightness = Brightness()
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    return module.brightness


def brightness_reward(images):
    from own_rewards import brightness  # here, so that its counter is no part of the identity

    return brightness(images)


SMALL = {
    "n_iterations": 3,
    "n_samples": 4,
    "n_steps": 4,
    "minibatch_size": 2,
    "micro_batch": 3,
    "n_development": 2,
    "learning_rate": 1e-3,
    "peak_learning_rate": 3e-3,
    "bf16": False,
}
"""A finetuning of a tiny policy that takes half a second."""


@pytest.fixture
def finetune(tmp_path, new_policy, brightness):
    """finetune(home="run", policy=None, reward=None, …, own=None, **settings): half a second."""

    def run(
        home="run", policy=None, reward=None, objective="ddpo", seed=0, own=None, embed=None,
        on_iteration=None, **settings,
    ):  # fmt: skip
        return loop.finetune(
            policy or new_policy(widths=(8,)),
            reward or brightness_reward,
            objective,
            Finetune(**SMALL | settings),
            tmp_path / home,
            seed=seed,
            objective_settings=own,
            embed=embed,
            on_iteration=on_iteration,
        )

    return run
