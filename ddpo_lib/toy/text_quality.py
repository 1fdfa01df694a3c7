"""Measure the toy Stable Diffusion against what is asked of it: `text` in data/toy/quality.json."""

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpo_lib import evaluation, policy
from ddpo_lib.encoders import Clip, embed_images
from ddpo_lib.toy.alignment import alignment
from ddpo_lib.toy.drawing import to_tensor
from ddpo_lib.toy.quality import precision_recall, rounded
from ddpo_lib.toy.regressor import Regressor
from ddpo_lib.toy.training import DOMAINS, draw

GUIDANCE = 3.0
"""The default of the toy Stable Diffusion."""
N_STEPS, N_EACH, N_HELD_OUT = 20, 40, 1000
PROMPTS = (
    "a baby", "an old person", "a woman", "a man", "a person with glasses", "a man with a beard",
    "a person with long brown hair", "a person with short brown hair", "a person, smiling",
    "a person, serious", "a person, dark skin", "a person, light skin", "a person, looking aside",
    "a person, looking at the camera", "a brick church", "a church with a dome",
    "a church with a tower", "a church at night", "a church in daylight", "a church, clouds",
    "a church, no clouds", "a church, many trees", "a church, no trees", "a church, many windows",
    "a church, hills behind", "a church, flat horizon",
)  # fmt: skip
"""Each names one attribute of the captions' grammar."""


def measure(folder: Path, clip: Clip, judge: Regressor, seed: int = 9) -> dict:
    """Nested dictionary: at guidance 1 and at the default, `shown`, how often the images of a
    prompt show what it names, as a regressor reads them, and precision and recall of each domain's
    images, drawn from the captions of held-out drawings; and psnr_db of the autoencoder."""
    held_out = {domain: draw(domain, N_HELD_OUT, seed) for domain in DOMAINS}
    rng = np.random.default_rng(seed)
    captions = {
        domain: tuple(DOMAINS[domain].captions(drawn.factors, rng))
        for domain, drawn in held_out.items()
    }
    n, result = N_EACH * len(PROMPTS), {"n_each": N_EACH, "default_guidance": GUIDANCE}
    for guidance in (1.0, GUIDANCE):
        agent = policy.load(folder, guidance=guidance)
        options = {"n_steps": N_STEPS, "seed": seed, "progress": f"guidance {guidance:g}"}
        pictures = evaluation.draw(agent, n, prompts=PROMPTS, **options)
        told = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
        holds = alignment(to_tensor(pictures), told, judge).view(N_EACH, -1).mean(0)
        own = {"shown": dict(zip(PROMPTS, holds.tolist(), strict=True))}
        for domain, drawn in held_out.items():
            pictures = evaluation.draw(agent, N_HELD_OUT, prompts=captions[domain], **options)
            both = (_embed(clip, each) for each in (drawn.pictures, pictures))
            own[domain] = dict(zip(("precision", "recall"), precision_recall(*both), strict=True))
        result[f"guidance_{guidance:g}"] = own
    return rounded(result | {"psnr_db": psnr(agent, [each.pictures for each in held_out.values()])})


@torch.no_grad()
def psnr(agent: policy.Policy, pictures: list[np.ndarray]) -> float:
    """Of uint8 pictures through the autoencoder and back, in decibels."""
    errors, vae = [], agent.text.vae
    for part in tqdm(torch.from_numpy(np.concatenate(pictures)).split(250), desc="autoencoder"):
        images = to_tensor(part.numpy())
        again = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((again - images).square().mean((1, 2, 3)))
    return -10 * torch.log10(torch.cat(errors).mean() / 4).item()


def _embed(clip: Clip, pictures: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return embed_images(clip, to_tensor(pictures)).float()
