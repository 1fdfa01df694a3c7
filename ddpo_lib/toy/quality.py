"""Measure the toy world against what is asked of it: the numbers of data/toy/quality.json."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ddpo_lib import rewards, sampler
from ddpo_lib.encoders import (
    OVER50,
    AestheticHead,
    AgeClassifier,
    Clip,
    age_logits,
    embed_images,
    embed_texts,
)
from ddpo_lib.policy import Policy, steps
from ddpo_lib.toy.drawing import to_tensor
from ddpo_lib.toy.encoders import age_class
from ddpo_lib.toy.regressor import TARGETS, Regressor, estimate
from ddpo_lib.toy.training import DOMAINS, Drawn, draw

N_HELD_OUT, N_AGREEMENT = 2000, 200
N_STEPS = {0.0: 40, 1.0: 20}
"""eta → steps of the sampler."""
NEIGHBOURS = 5
"""k of the manifolds. Kynkaanniemi et al. use 3 on 50,000 pictures; on 2,000 the balls around the
nearest 3 leave holes even between two sets of drawn pictures (see `ceiling` in the result)."""


@dataclass(frozen=True)
class Samples:
    """What a policy draws from one set of initial noise; uint8 (N, 64, 64, 3) each."""

    eta0: np.ndarray
    eta1: np.ndarray
    first_step: np.ndarray
    """The denoised state x~ of the first step, in float32, clipped as the sampler clips it."""


def sample(policy: Policy, n: int, seed: int = 6) -> Samples:
    """Draw n samples at eta = 0 and at eta = 1, by `N_STEPS` each, and look at a step from t = 950,
    the first of 20."""
    seeds = sampler.seeds(seed, n)
    x_T = sampler.noise(policy, seeds)
    options = {"seeds": seeds, "batch_size": 250, "progress": "sampling"}
    samples = [sampler.sample(policy, x_T, N_STEPS[eta], eta, **options) for eta in (0.0, 1.0)]
    t, t_prev = (each[0] for each in steps(policy, 20))
    with torch.no_grad():
        exact = dataclasses.replace(policy, bf16=False)
        samples.append(sampler.step(exact, x_T, t, t_prev, eta=0.0).denoised)
    return Samples(*(rewards.to_uint8(images).numpy() for images in samples))


def contact_sheet(pictures: np.ndarray, columns: int = 20) -> Image.Image:
    """Pictures (N, H, W, 3), N a multiple of the columns, side by side, to be looked at."""
    n, height, width, _ = pictures.shape
    rows = pictures.reshape(n // columns, columns, height, width, 3).swapaxes(1, 2)
    return Image.fromarray(rows.reshape(n // columns * height, columns * width, 3))


def measure(
    samples: dict[str, Samples],
    clip: Clip,
    age: AgeClassifier,
    head: AestheticHead,
    regressors: list[Regressor],
    seed: int = 7,
) -> dict:
    """Measure policies and encoders on held-out pictures drawn from `seed`.

    Args:
        samples: of each domain's policy.
        regressors: two, trained from different seeds; the first is the one in use.

    Returns:
        nested dictionary of numbers: per domain precision and recall, with the `ceiling` that a
        fresh set of drawn pictures reaches, agreement of the two regressors on samples, and what is
        to be seen in the first step; for the faces share_50_or_over; `eta1`, the same at eta = 1;
        clip.balanced_accuracy; age.within_one_class and age.auc_50; aesthetic.pair_agreement;
        regressor.correlation.
    """
    held_out = {domain: draw(domain, N_HELD_OUT, seed) for domain in DOMAINS}
    fresh = {domain: draw(domain, N_HELD_OUT, seed + 1) for domain in DOMAINS}
    balanced = draw("faces", N_HELD_OUT, seed + 2, age_balanced=1.0)
    embeddings = {domain: embed(clip, drawn.pictures) for domain, drawn in held_out.items()}

    result: dict = {}
    for domain, drawn in samples.items():
        real, people = embeddings[domain], age if domain == "faces" else None
        result[domain] = {
            **distance(real, clip, drawn.eta0, people),
            "eta1": distance(real, clip, drawn.eta1, people),
            "ceiling": distance(real, clip, fresh[domain].pictures, None),
            "neighbours": NEIGHBOURS,
            "n": len(drawn.eta0),
            "agreement": agreement(regressors, drawn.eta0[:N_AGREEMENT], domain),
            "first_step": first_step(drawn),
        }
    accuracies = [
        zero_shot_accuracy(clip, drawn, embeddings[domain]) for domain, drawn in held_out.items()
    ]
    result["clip"] = {"balanced_accuracy": accuracies[0] | accuracies[1]}
    result["age"] = age_quality(age, balanced)
    agreements = {
        domain: pair_agreement(head, embeddings[domain], drawn.taste)
        for domain, drawn in held_out.items()
    }
    result["aesthetic"] = {"pair_agreement": float(np.mean(list(agreements.values())))} | agreements
    result["regressor"] = {
        "correlation": {
            domain: regressor_correlations(regressors[0], drawn)
            for domain, drawn in held_out.items()
        }
    }
    return rounded(result)


def distance(
    real: torch.Tensor, clip: Clip, pictures: np.ndarray, age: AgeClassifier | None
) -> dict[str, float]:
    """How far samples are from real ones: precision, recall and, of people, the share of old."""
    result = dict(
        zip(("precision", "recall"), precision_recall(real, embed(clip, pictures)), strict=True)
    )
    return result | ({"share_50_or_over": share_50_or_over(age, pictures)} if age else {})


def agreement(regressors: list[Regressor], pictures: np.ndarray, domain: str) -> dict[str, float]:
    """Correlation of what two regressors read in samples (N, 64, 64, 3), factor by factor: where
    each sees its own, the factor is not legible."""
    first, second = (estimate(each, to_tensor(pictures), domain) for each in regressors)
    return {
        name: np.corrcoef(values.cpu(), second[name].cpu())[0, 1] for name, values in first.items()
    }


def first_step(samples: Samples) -> dict[str, float]:
    """How much of a sample its first step foretells: the mean correlation of x~ with the sample at
    eta = 0, both averaged down to 8 x 8, and the share of pixels of x~ with a saturated colour."""
    low = [
        F.adaptive_avg_pool2d(to_tensor(pictures), 8).flatten(1).double().numpy()
        for pictures in (samples.first_step, samples.eta0)
    ]
    saturated = ((samples.first_step == 0) | (samples.first_step == 255)).any(axis=3)
    return {
        "correlation": np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*low, strict=True)]),
        "saturated": saturated.mean(),
    }


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall of k-NN manifolds, both in [0, 1].

    Args:
        real, generated: embeddings (N, D) and (M, D).

    Source: Kynkaanniemi et al. 2019, equations 1 to 3.
    """
    between = torch.cdist(generated, real)

    def radii(points: torch.Tensor) -> torch.Tensor:
        # The nearest neighbour of a point is the point itself, so the k-th other is at k + 1.
        return torch.cdist(points, points).kthvalue(neighbours + 1, dim=1).values

    precision = (between <= radii(real)[None]).any(dim=1)
    recall = (between <= radii(generated)[:, None]).any(dim=0)
    return precision.float().mean().item(), recall.float().mean().item()


def share_50_or_over(age: AgeClassifier, pictures: np.ndarray) -> float:
    """Share of faces, uint8 (N, 64, 64, 3), whose most probable class is 50 or over."""
    with torch.no_grad():
        classes = age_logits(age, to_tensor(pictures)).argmax(dim=1)
    return (classes >= OVER50[0]).float().mean().item()


def zero_shot_accuracy(clip: Clip, drawn: Drawn, embeddings: torch.Tensor) -> dict[str, float]:
    """Balanced accuracy of every attribute of the domain: the nearer of its two prompts wins."""
    accuracies = {}
    for name, (positive, negative, holds) in DOMAINS[drawn.domain].ATTRIBUTES.items():
        prompts = embed_texts(clip, [positive, negative])
        said = (embeddings @ prompts.T).argmax(dim=1).cpu().numpy() == 0
        truth = np.asarray(holds(drawn.factors), bool)
        accuracies[name] = (said[truth].mean() + (~said[~truth]).mean()) / 2
    return accuracies


def age_quality(age: AgeClassifier, drawn: Drawn) -> dict[str, float]:
    """On faces of balanced age: share within one class of the truth, and the AUC for 50 or over."""
    with torch.no_grad():
        p = age_logits(age, to_tensor(drawn.pictures)).softmax(dim=1).cpu().numpy()
    truth = age_class(drawn.factors["age"])
    near = np.abs(p.argmax(axis=1) - truth) <= 1
    return {
        "within_one_class": np.mean([near[truth == k].mean() for k in range(9)]),
        "auc_50": auc(p[:, list(OVER50)].sum(axis=1), truth >= OVER50[0]),
    }


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Probability that a random true case scores above a random false one; ties count half."""
    true, false = scores[truth][:, None], scores[~truth][None]
    return float((true > false).mean() + 0.5 * (true == false).mean())


def pair_agreement(head: AestheticHead, embeddings: torch.Tensor, taste: np.ndarray) -> float:
    """Share of held-out pairs that the head orders as the rater's true taste does."""
    with torch.no_grad():
        scores = head(embeddings).cpu().numpy()
    (score_a, score_b), (taste_a, taste_b) = np.split(scores, 2), np.split(taste, 2)
    return float(((score_a > score_b) == (taste_a > taste_b)).mean())


def regressor_correlations(regressor: Regressor, drawn: Drawn) -> dict[str, float]:
    """Correlation of each estimate with the truth."""
    estimates = estimate(regressor, to_tensor(drawn.pictures), drawn.domain)
    truths = TARGETS[drawn.domain]
    return {
        name: np.corrcoef(values.cpu(), truths[name](drawn.factors).astype(float))[0, 1]
        for name, values in estimates.items()
    }


def embed(clip: Clip, pictures: np.ndarray) -> torch.Tensor:
    """CLIP's embeddings (N, D) of pictures, uint8 (N, 64, 64, 3)."""
    with torch.no_grad():
        return embed_images(clip, to_tensor(pictures)).float()


def rounded(value):
    """Plain floats of four digits all the way down, for JSON."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return value if isinstance(value, int) else round(float(value), 4)
