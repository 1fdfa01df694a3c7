"""Stable Diffusion 1.x at its exact size, with random weights: no network, no GPU, minutes.

It draws images of 128×128: the network and its 860 million weights are the same for every size, and
one of 512×512 takes a core more than 16 times as long.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ddpo_lib import runs

pytestmark = pytest.mark.slow

N_WEIGHTS = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
PEAK_GIB = 12
"""Of two iterations with LoRA, all in one process; the test prints what it measures."""

SCRIPT = """
import resource, sys
from ddpo_lib import policy
from ddpo_lib.finetune import finetune
from ddpo_lib.settings import Finetune


def brightness(images, prompts):
    assert len(images) == len(prompts)
    return images.mean((1, 2, 3))


painter = policy.load(sys.argv[1], guidance=5.0)
settings = Finetune(
    n_iterations=2, n_samples=2, minibatch_size=2, n_steps=2, n_development=2, micro_batch=2,
    prompts=("a cat", "a dog"), adapter_rank=4, learning_rate=3e-4,
)
finetune(painter, brightness, "ddpo", settings, sys.argv[2])
print("peak GiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, letter_tokenizer):
    """CompVis/stable-diffusion-v1-4 as its configurations describe it, but for the words."""
    home = tmp_path_factory.mktemp("sd14")
    tokenizer = letter_tokenizer(home, model_max_length=77)
    torch.manual_seed(0)
    parts = {
        "unet": UNet2DConditionModel(
            sample_size=16, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
            cross_attention_dim=768, attention_head_dim=8,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu",
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
    }  # fmt: skip
    for name, n in N_WEIGHTS.items():
        assert sum(p.numel() for p in parts[name].parameters()) == n, name
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, skip_prk_steps=True,
    )  # fmt: skip
    StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(home / "pipeline")  # fmt: skip
    return home / "pipeline"


def start(folder, where):
    """The script in a process group of its own."""
    (where / "script.py").write_text(SCRIPT)
    log = (where / "log.txt").open("a")
    command = [sys.executable, "script.py", folder, where / "run"]
    return subprocess.Popen(
        command, cwd=where, stdout=log, stderr=log, start_new_session=True, env=os.environ
    )


def test_exact_stable_diffusion_is_finetuned_killed_and_resumed(folder, tmp_path):
    home, log = tmp_path / "run", tmp_path / "log.txt"
    process = start(folder, tmp_path)
    while not (home / "last" / "state.json").exists():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert runs.iterations_done(home) == 1
    before = runs.metrics(home)[1]

    assert start(folder, tmp_path).wait() == 0, log.read_text()[-3000:]
    rows = runs.metrics(home)
    assert rows[1] == before and [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(row["reward_mean"]) and row["mean_ratio"] for row in rows[1:])
    peak = float(log.read_text().split("peak GiB")[1])
    print(f"peak memory {peak:.1f} GiB")
    assert peak < PEAK_GIB
    # The checkpoint is the adapter alone.
    size = sum(file.stat().st_size for file in (home / "best").rglob("*") if file.is_file())
    assert size < 20e6
    told = json.loads((home / "settings.json").read_text(encoding="utf-8"))
    assert told["identity"]["settings"]["adapter_rank"] == 4
