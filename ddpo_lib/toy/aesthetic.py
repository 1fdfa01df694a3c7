"""Learn the toy aesthetic head from a simulated rater's noisy choices between pairs of pictures."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ddpo_lib.encoders import AestheticHead, Clip, embed_images
from ddpo_lib.toy.drawing import to_tensor
from ddpo_lib.toy.training import DEVICE, Drawn, augment, fit

AESTHETIC_STEPS = 1500
BATCH_SIZE = 512
TEMPERATURE = 0.3
MEAN_SCORE, SCORE_SD = 5.0, 0.5


def rate(better: np.ndarray, worse: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Does the rater prefer `better`, given both true tastes (N,)? Bool (N,).

    The choice is noisy: its probability is sigmoid((taste_a - taste_b) / TEMPERATURE).
    """
    return rng.random(len(better)) < 1 / (1 + np.exp((worse - better) / TEMPERATURE))


def bradley_terry_loss(preferred: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(s_w - s_l) over scores (N,) of chosen and refused pictures.

    Source: thesis, equation 3.25.
    """
    return -F.logsigmoid(preferred - other).mean()


def train_aesthetic_head(
    clip: Clip,
    drawn: list[Drawn],
    tastes: list[np.ndarray],
    folder: Path,
    seed: int,
    n_steps: int = AESTHETIC_STEPS,
) -> None:
    """Train the head on frozen CLIP embeddings of pictures, in pairs within a domain, and save it;
    tastes are the rater's, (N,) of each domain's pictures.

    Only differences of scores are learned. The last layer is shifted and scaled afterwards so that
    natural pictures score 5 +- 0.5, as photographs do on the 1 to 10 scale of LAION's head.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pictures = [to_tensor(part.pictures) for part in drawn]
    with torch.no_grad():
        clean = [embed_images(clip, of) for of in pictures]
        rough = [
            torch.cat([embed_images(clip, augment(part)) for part in of.split(250)])
            for of in pictures
        ]
    head = AestheticHead(clean[0].shape[1]).to(DEVICE)

    def loss() -> torch.Tensor:
        losses = []
        for embeddings in (clean, rough):
            for of, taste in zip(embeddings, tastes, strict=True):
                a, b = rng.integers(len(taste), size=(2, BATCH_SIZE // 4))
                chosen = rate(taste[a], taste[b], rng)
                winners, losers = np.where(chosen, a, b), np.where(chosen, b, a)
                scores = head(of[winners]).float(), head(of[losers]).float()
                losses.append(bradley_terry_loss(*scores))
        return torch.stack(losses).mean()

    fit(head, loss, n_steps, 1e-3, "the aesthetic head")
    with torch.no_grad():
        scores = torch.cat([head(of) for of in clean])
        last = head.layers[-1]
        factor = SCORE_SD / scores.std()
        last.weight *= factor
        last.bias.copy_((last.bias - scores.mean()) * factor + MEAN_SCORE)
    save_file(head.cpu().state_dict(), folder / "model.safetensors")
