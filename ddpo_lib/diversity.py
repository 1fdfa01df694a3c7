"""How varied a set of pictures is: embeddings, a map of them, Vendi score, entropy of a factor."""

import numpy as np
import torch
from sklearn.manifold import TSNE

from ddpo_lib import encoders, paths, rewards
from ddpo_lib.config import Models

PERPLEXITY = 30


def embed(pictures: np.ndarray, models: Models) -> np.ndarray:
    """CLIP embeddings (n, D), float64 of length 1, of uint8 pictures (n, H, W, 3)."""
    clip = encoders.load_clip(paths.resolve(models.clip))
    with torch.no_grad():
        embeddings = encoders.embed_images(clip, rewards.from_uint8(torch.from_numpy(pictures)))
    return embeddings.double().cpu().numpy()


def tsne(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """A map (n, 2) on which near neighbours among embeddings (n, D) stay near.

    Distances across the map and areas of its clusters mean nothing. The perplexity is 30, or a
    third of n where there are fewer than 90.

    Source: van der Maaten and Hinton, 2008.
    """
    if embeddings.ndim != 2 or len(embeddings) < 4:
        raise ValueError(
            f"t-SNE of an array of shape {embeddings.shape}: give embeddings (n, D) of at least "
            "four pictures"
        )
    perplexity = min(PERPLEXITY, len(embeddings) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(embeddings)


def vendi_score(embeddings: np.ndarray) -> float:
    """The effective number of different pictures: 1 where all are the same, n where none are alike.

    With the eigenvalues l_i of K / n, where K holds the cosines between the pictures, it is
    exp(-sum_i l_i log l_i).

    Args:
        embeddings: (n, D), each of length 1.

    Raises:
        ValueError: an embedding is of another length.

    Source: Friedman and Dieng, 2023, definition 3.1.
    """
    lengths = np.linalg.norm(embeddings, axis=1)
    if not np.allclose(lengths, 1, atol=1e-3):
        raise ValueError(
            f"the embeddings' lengths are {lengths.min():.3g} to {lengths.max():.3g}, must be 1: "
            "divide each by its own"
        )
    n, size = embeddings.shape
    # X Xᵀ and Xᵀ X have the same eigenvalues but for zeros, which count nothing.
    gram = embeddings @ embeddings.T if n < size else embeddings.T @ embeddings
    return float(np.exp(_entropy(np.linalg.eigvalsh(gram / n))))


def entropy(values: np.ndarray, levels: np.ndarray) -> float:
    """Shannon entropy in bits of values (n,), each counted at the nearest of the levels (k,).

    From 0, where all fall to one level, to log2 k, where they are spread evenly.
    """
    levels = np.unique(levels)
    if not (len(values) and len(levels) and np.isfinite(values).all()):
        raise ValueError(
            f"entropy of {len(values)} values at {len(levels)} levels: give at least one of each, "
            "all values finite"
        )
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
    return float(_entropy(np.bincount(nearest) / len(values)) / np.log(2))


def _entropy(shares: np.ndarray) -> float:
    """Of shares that sum to 1, in nats; rounding may have put eigenvalues a little below 0."""
    shares = shares[shares > 0]
    return max(-(shares * np.log(shares)).sum(), 0.0)
