"""The thesis world's models at their exact sizes, with random weights: no network, no GPU, minutes.

The policy draws pictures of 32×32 here: the network and its 113.7 million weights are the same for
every size, and one of 256×256 takes a core 64 times as long.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from ddpo_lib import encoders, hub, rewards, runs
from ddpo_lib.book import paths

pytestmark = pytest.mark.slow

N_WEIGHTS = 113_673_219
COUNTS = {"n_samples": 4, "n_steps": 3, "minibatch_size": 2, "micro_batch": 4, "n_development": 2}


def exact_unet(side):
    """google/ddpm-celebahq-256's network, as its config.json describes it."""
    down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
    down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    return UNet2DModel(
        sample_size=side,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=2,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=32,
    )


# ------------------------------------------------------------------------------- policy


@pytest.fixture
def root(tmp_path):
    """A checkout whose profile thesis has the exact policy in the Hub's layout; small counts."""
    for folder in ("ddpo_lib", "config", "notebooks", "data/thesis"):
        shutil.copytree(paths.ROOT / folder, tmp_path / folder)
    torch.manual_seed(0)
    model = tmp_path / "data" / "google" / "ddpm-celebahq-256"
    exact_unet(32).save_pretrained(model, safe_serialization=False)
    DDPMScheduler(1000).save_pretrained(model)
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.0.4"}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (model / "model_index.json").write_text(json.dumps(index))
    profile = yaml.safe_load((paths.CONFIG / "thesis.yaml").read_text())
    profile["policies"]["faces"] = "google/ddpm-celebahq-256"
    profile["evaluation"] |= {"n": 2, "n_steps": 3}
    (tmp_path / "config" / "thesis.yaml").write_text(yaml.safe_dump(profile))
    return tmp_path


def start(root):
    """50_finetune in a process group of its own."""
    given = {"profile": "thesis", "task": "compressibility", "n_iterations": 2, **COUNTS}
    command = [sys.executable, "-m", "papermill", "--kernel", "python3", "--no-progress-bar"]
    command += ["notebooks/50_finetune.ipynb", "done.ipynb"]
    for name, value in given.items():
        command += ["-p", name, str(value)]
    log = (root / "log.txt").open("a")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True
    )


def test_exact_policy_is_finetuned_killed_resumed_and_loads_in_plain_diffusers(root):
    home = root / "data" / "runs" / "thesis" / "faces-compressibility-s0"
    process = start(root)
    while not (home / "last" / "state.json").exists():
        assert process.poll() is None, (root / "log.txt").read_text()[-3000:]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert runs.iterations_done(home) == 1
    before = runs.metrics(home)[1]

    assert start(root).wait() == 0, (root / "log.txt").read_text()[-3000:]
    rows = runs.metrics(home)
    assert rows[1] == before
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert sum(len(row["updates"]) for row in rows[1:]) == 4
    assert json.loads((home / "evaluation.json").read_text())["n"] == 2

    pipeline = DDPMPipeline.from_pretrained(home / "best", use_safetensors=True)
    assert sum(p.numel() for p in pipeline.unet.parameters()) == N_WEIGHTS
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(1, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3) and np.isfinite(drawn).all()
    card = (home / "best/README.md").read_text(encoding="utf-8")
    assert "finetuned with DDPO: compressibility" in card


# ------------------------------------------------------------------------------- rewards


@pytest.fixture(scope="module")
def pictures():
    """Two of 256×256 in the policy's range, on 8-bit levels: smooth, as photographs mostly are."""
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (256, 256), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 127.5 - 1


def as_images(pictures):
    return [Image.fromarray(picture) for picture in rewards.to_uint8(pictures).numpy()]


def test_exact_aesthetic_stack_scores_as_the_published_code_does(pictures, tmp_path, monkeypatch):
    commit = "18d0535469bb561bf468d76c1d73aa35156c922b"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--timm--vit_large_patch14_clip_224.openai"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    torch.manual_seed(1)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-L-14", force_quick_gelu=True)
    save_file(model.state_dict(), snapshot / "open_clip_model.safetensors")
    head = encoders.AestheticHead().eval()
    torch.save(head.state_dict(), tmp_path / hub.LAION_HEAD)
    digest = hashlib.sha256((tmp_path / hub.LAION_HEAD).read_bytes()).hexdigest()
    monkeypatch.setattr(encoders, "LAION_HEAD_SHA256", digest)
    with torch.no_grad():
        batch = torch.stack([preprocess(image) for image in as_images(pictures)])
        expected = head(model.eval().encode_image(batch, normalize=True))
    del model

    models = {
        "clip": f"ViT-L-14:openai@{commit}", "aesthetic": str(tmp_path / hub.LAION_HEAD),
    }  # fmt: skip
    scores = rewards.load("aesthetic", models, "cpu")(pictures)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-3)


def test_exact_age_classifier_scores_as_the_published_code_does(pictures, tmp_path):
    torch.manual_seed(2)
    labels = dict(enumerate(encoders.AGE_CLASSES))
    model = ViTForImageClassification(ViTConfig(num_labels=9, id2label=labels)).eval()
    model.save_pretrained(tmp_path)
    published = {
        "feature_extractor_type": "ViTFeatureExtractor", "do_normalize": True, "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "size": 224,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**processor(as_images(pictures), return_tensors="pt")).logits

    scores = rewards.load("over50", {"age": str(tmp_path)}, "cpu")(pictures)
    torch.testing.assert_close(scores, expected[:, 6:].sum(1), rtol=0, atol=1e-3)
