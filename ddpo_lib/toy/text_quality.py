"""Measure the toy Stable Diffusion against what is asked of it: `text` in data/toy/quality.json."""

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpo_lib import evaluation, policy
from ddpo_lib.encoders import Clip
from ddpo_lib.toy.alignment import STATEMENTS, statements
from ddpo_lib.toy.drawing import to_tensor
from ddpo_lib.toy.quality import distance, embed, rounded
from ddpo_lib.toy.regressor import Regressor, read
from ddpo_lib.toy.training import DOMAINS, Drawn, draw

GUIDANCE = 3.0
"""The default of the toy Stable Diffusion."""
N_STEPS, N_HELD_OUT, N_LEAST = 20, 500, 10


def measure(folder: Path, clip: Clip, judge: Regressor, seed: int = 9) -> dict:
    """Nested dictionary, from images drawn for the captions of held-out drawings: at guidance 1 and
    at the default, for each domain, `shown`, how often an image shows what its caption states, and
    precision and recall against the drawings; and psnr_db of the autoencoder."""
    held_out = {domain: draw(domain, N_HELD_OUT, seed) for domain in DOMAINS}
    rng, result = np.random.default_rng(seed), {"n": N_HELD_OUT, "default_guidance": GUIDANCE}
    captions = {
        domain: tuple(DOMAINS[domain].captions(drawn.factors, rng))
        for domain, drawn in held_out.items()
    }
    embeddings = {domain: embed(clip, drawn.pictures) for domain, drawn in held_out.items()}
    for guidance in (1.0, GUIDANCE):
        agent, own = policy.load(folder, guidance=guidance), {}
        for domain, real in embeddings.items():
            title = f"{domain} at guidance {guidance:g}"
            pictures = evaluation.draw(
                agent, N_HELD_OUT, N_STEPS, seed, progress=title, prompts=captions[domain]
            )
            own[domain] = distance(real, clip, pictures, None)
            own[domain]["shown"] = shown(pictures, captions[domain], domain, judge)
        result[f"guidance_{guidance:g}"] = own
    return rounded(result | {"psnr_db": psnr(agent, list(held_out.values()))})


def shown(pictures: np.ndarray, captions: tuple, domain: str, judge: Regressor) -> dict[str, float]:
    """Of each of `alignment.STATEMENTS` that at least N_LEAST captions make, the share of their
    pictures that show it, as the regressor reads them."""
    seen = read(judge, to_tensor(pictures), domain)
    told = [statements(caption)[1] for caption in captions]
    shares = {}
    for words, (factor, holds) in STATEMENTS[domain].items():
        of = [i for i, said in enumerate(told) if words in said]
        if len(of) >= N_LEAST:
            shares[words] = holds(seen[factor][of]).double().mean().item()
    return shares


@torch.no_grad()
def psnr(agent: policy.Policy, drawn: list[Drawn]) -> float:
    """Of drawings through the autoencoder and back, in decibels."""
    errors, vae = [], agent.text.vae
    images = to_tensor(np.concatenate([part.pictures for part in drawn]))
    for part in tqdm(images.split(250), desc="autoencoder", leave=False):
        again = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((again - part).square().mean((1, 2, 3)))
    return -10 * torch.log10(torch.cat(errors).mean() / 4).item()
