"""What the toy encoders' trainings share: drawn pictures, augmentation, one optimizer loop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ddpo_lib.toy import churches, faces
from ddpo_lib.toy.drawing import to_tensor

TOY = Path(__file__).resolve().parents[2] / "data" / "toy"
DOMAINS: dict[str, ModuleType] = {"faces": faces, "churches": churches}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Drawn:
    """Pictures of one domain with the factors from which they were drawn."""

    domain: str
    """A key of DOMAINS."""
    pictures: np.ndarray
    """uint8 (N, 64, 64, 3)."""
    factors: dict[str, np.ndarray]
    """Each (N,)."""

    @property
    def taste(self) -> np.ndarray:
        """The simulated rater's true score (N,), about 0 +- 1."""
        return DOMAINS[self.domain].taste(self.factors)

    def __len__(self) -> int:
        return len(self.pictures)


def draw(domain: str, n: int, seed: int, age_balanced: float = 0.0) -> Drawn:
    """Draw `n` pictures of a domain.

    Args:
        age_balanced: share of the faces whose age class is uniform over the nine; the others'
            ages, and all churches, are natural.
    """
    rng = np.random.default_rng(seed)
    artist = DOMAINS[domain]
    parts = [artist.sample_factors(n - round(age_balanced * n), rng)]
    if age_balanced:
        classes = rng.integers(9, size=round(age_balanced * n))
        parts.append(artist.sample_factors(len(classes), rng, age_classes=classes))
    factors = {name: np.concatenate([part[name] for part in parts]) for name in artist.FACTORS}
    pictures = [
        artist.draw({name: values[i : i + 500] for name, values in factors.items()})
        for i in tqdm(
            range(0, n, 500), desc=f"drawing {domain}", unit=" × 500 pictures", leave=False
        )
    ]
    return Drawn(domain, np.concatenate(pictures), factors)


def augment(x: torch.Tensor) -> torch.Tensor:
    """Make clean pictures (N, 3, H, W) in [-1, 1] resemble generated ones, for robust judges.

    Each is shifted by up to a pixel and blurred slightly, its colours are scaled and offset by
    about 2 % (no more: warmth is a quality that is judged), and noise of up to 0.08 is added.
    """
    n, device = len(x), x.device

    def uniform(low, high, *shape) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, device=device)

    # A narrow Gaussian off its centre shifts and blurs at once.
    ticks, width = torch.arange(-2, 3, device=device), uniform(0.2, 0.75, 1)
    rows, columns = (
        torch.softmax(-((ticks - uniform(-1, 1, 1)) ** 2) / (2 * width**2), dim=1) for _ in "yx"
    )
    kernels = (rows[:, :, None] * columns[:, None]).repeat_interleave(3, 0)[:, None]
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
    x = F.conv2d(padded, kernels, groups=3 * n).view_as(x)
    x = x * uniform(0.96, 1.04, 3, 1, 1) + uniform(-0.04, 0.04, 3, 1, 1)
    x = x + uniform(0, 0.08, 1, 1, 1) * torch.randn_like(x)
    return x.clamp(-1, 1)


def pick(drawn: Drawn, n: int, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """A random batch: augmented pictures (n, 3, H, W) in [-1, 1] and their places in `drawn`."""
    places = rng.integers(len(drawn), size=n)
    return augment(to_tensor(drawn.pictures[places]).to(DEVICE)), places


def fit(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    n_steps: int,
    learning_rate: float,
    what: str,
) -> None:
    """Minimise `loss()`, which draws its own batch, over the model's parameters with AdamW.

    The learning rate warms up to `learning_rate` over a tenth of the steps and decays to zero by a
    cosine; the loss is worked out under bfloat16 autocast.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=n_steps, pct_start=0.1, cycle_momentum=False
    )
    bar = tqdm(range(n_steps), desc=f"training {what}", unit="step")
    for step in bar:
        # On CPUs the fused attention is slower in bfloat16 than the plain one.
        with torch.autocast(DEVICE, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")
    model.eval()
