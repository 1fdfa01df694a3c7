"""A reward model that is fitted again: does it still promise too much of a policy's images, once
the rater has been asked about them (thesis, section 3.7)?"""

from collections.abc import Callable

import numpy as np
import torch

from ddpo_lib import diversity, evaluation
from ddpo_lib.encoders import Clip
from ddpo_lib.toy.aesthetic import bradley_terry_loss, rate
from ddpo_lib.toy.training import Drawn

HEADS = ("shipped", "drawings", "own images")
"""The score as it is; heads of new choices between drawings, and between images of the run."""
N_CHOICES = 4000
PRIOR = 1e-2  # on squared weights: keeps 256 of them from explaining some choices too well


def promises(
    images: np.ndarray,
    base: np.ndarray,
    drawings: Drawn,
    clip: Clip,
    score: Callable[[np.ndarray], np.ndarray],
    judges: list[Callable[[np.ndarray], np.ndarray]],
    seed: int,
) -> dict[str, float]:
    """What each of `HEADS` promises of a run's last images, and "truth", what the second judge
    sees, in standard deviations of the pretrained policy's images from their mean.

    The first half of the noises is what the rater is asked about, with the taste that the first
    judge reads; the last images of the other half are what everything is judged by.

    Args:
        images: uint8 (iterations, n, H, W, C), from the same n noises, n at least 2.
        base: uint8 (m, H, W, C) of the pretrained policy.
        score: the reward that the run had, uint8 images to (n,), as are the two judges.
    """
    half = images.shape[1] // 2
    asked, new = images[:, :half].reshape(-1, *images.shape[2:]), images[-1, half:]
    raw = {name: (score(x), diversity.embed(x, clip)) for name, x in {
        "base": base, "asked": asked, "new": new, "drawings": drawings.pictures,
    }.items()}  # fmt: skip
    scores, embeddings = raw["base"]
    seen = {
        name: np.column_stack([
            (own - scores.mean()) / scores.std(),
            (of - embeddings.mean(0)) / embeddings.std(0).mean(),
        ])
        for name, (own, of) in raw.items()
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    weights = {
        "shipped": np.eye(seen["base"].shape[1])[0],
        "drawings": fit_head(seen["drawings"], drawings.taste, rng),
        "own images": fit_head(seen["asked"], judges[0](asked), rng),
    }
    told = {
        name: evaluation.change(seen["base"] @ w, seen["new"] @ w) for name, w in weights.items()
    }
    return told | {"truth": evaluation.change(judges[1](base), judges[1](new))}


def fit_head(features: np.ndarray, taste: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weights (D,) of a linear head that make `N_CHOICES` of the rater most likely (3.25), between
    random pairs of images with features (n, D) and true tastes (n,). The first weight is free."""
    a, b = rng.integers(len(taste), size=(2, N_CHOICES))
    first = rate(taste[a], taste[b], rng)[:, None]
    difference = torch.from_numpy(np.where(first, 1.0, -1.0) * (features[a] - features[b]))
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        margins = difference @ weights
        value = bradley_terry_loss(margins, torch.zeros_like(margins))
        value = value + PRIOR * weights[1:].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach().numpy()
