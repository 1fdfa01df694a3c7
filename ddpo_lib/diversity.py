"""How varied images are: embeddings, a map of them, Vendi score, spread, entropy of a factor."""

import numpy as np
import torch

from ddpo_lib import encoders, rewards

PERPLEXITY = 30


def embed(images: np.ndarray, clip: encoders.Clip) -> np.ndarray:
    """CLIP embeddings (n, D), float64 of length 1, of uint8 images (n, S, S, 3)."""
    with torch.no_grad():
        embeddings = encoders.embed_images(clip, rewards.from_uint8(torch.from_numpy(images)))
    return embeddings.double().cpu().numpy()


def tsne(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """A map (n, 2) on which near neighbours among embeddings (n, D) stay near; n is at least 4.

    Distances across the map and areas of its clusters mean nothing. The perplexity is 30, or a
    third of n where there are fewer than 90. Source: van der Maaten and Hinton, 2008.
    """
    _check(embeddings, "t-SNE", at_least=4)
    if np.ptp(embeddings, axis=0).max() <= 1e-6 * np.abs(embeddings).max():
        raise ValueError(f"t-SNE of {len(embeddings)} images with one and the same embedding")
    from sklearn.manifold import TSNE  # takes a second

    perplexity = min(PERPLEXITY, len(embeddings) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(embeddings)


def vendi_score(embeddings: np.ndarray) -> float:
    """The effective number of different images: 1 where all are the same, n where none are alike.

    With the eigenvalues l_i of K / n, where K holds the cosines between embeddings (n, D) of length
    1, it is exp(-sum_i l_i log l_i). Source: Friedman and Dieng, 2023, definition 3.1.
    """
    _check(embeddings, "the Vendi score", at_least=1)
    lengths = np.linalg.norm(embeddings, axis=1)
    if not np.allclose(lengths, 1, atol=1e-3):
        said = f"{lengths.min():.3g} to {lengths.max():.3g}"
        raise ValueError(f"embeddings' lengths are {said}, must be 1: divide each by its own")
    n, size = embeddings.shape
    # X Xᵀ and Xᵀ X have the same eigenvalues but for zeros, which count nothing.
    gram = embeddings @ embeddings.T if n < size else embeddings.T @ embeddings
    return float(np.exp(_entropy(np.linalg.eigvalsh(gram / n))))


def spread(pictures: np.ndarray) -> float:
    """How far pictures (n, H, W, C) uint8 are from their mean: the root of the mean square over all
    values, on the scale [-1, 1]; 0 where all are the same."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or len(pictures) == 0:
        found = f"{pictures.dtype} of shape {pictures.shape}"
        raise ValueError(f"expected uint8 pictures (n, H, W, C), got {found}")
    return float(np.sqrt((pictures / 127.5).var(axis=0).mean()))


def entropy(values: np.ndarray, levels: np.ndarray) -> float:
    """Shannon entropy in bits of values (n,), each counted at the nearest of the levels (k,).

    From 0, where all fall to one level, to log2 k, where they are spread evenly.
    """
    levels = np.unique(levels)
    if not all(len(each) and np.isfinite(each).all() for each in (values, levels)):
        counts = f"{len(values)} values at {len(levels)} levels"
        raise ValueError(f"entropy of {counts}: give at least one of each, all finite")
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
    return float(_entropy(np.bincount(nearest) / len(values)) / np.log(2))


def _check(embeddings: np.ndarray, what: str, at_least: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) < at_least:
        needed = f"give embeddings (n, D) of at least {at_least} images"
        raise ValueError(f"{what} of an array of shape {embeddings.shape}: {needed}")
    if bad := np.flatnonzero(~np.isfinite(embeddings).all(axis=1)).tolist():
        raise ValueError(f"{what}: embeddings {bad[:10]} are not finite")


def _entropy(shares: np.ndarray) -> float:
    """Of shares that sum to 1, in nats; rounding may have put eigenvalues a little below 0."""
    shares = shares[shares > 0]
    return max(-(shares * np.log(shares)).sum(), 0.0)
