"""The factor regressor: what is true of a generated picture, which has no factors of its own.

A small frozen network estimates the simulated rater's true taste and the factors behind it. It is
never optimised against: rewards are the proxies, this is the yardstick beside them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ddpo_lib.toy import churches, faces
from ddpo_lib.toy.training import DEVICE, DOMAINS, Drawn, fit, pick

REGRESSOR_STEPS = 2000
BATCH_SIZE = 128
SUNSET = 2  # value of the churches' factor "time"

TARGETS = {
    "faces": {
        "taste": faces.taste,
        "age": faces.apparent_age,
        "feminine": lambda f: f["feminine"],
        "dark_skin": lambda f: f["skin_tone"],
        "hair_length": lambda f: f["hair_length"],
        "glasses": lambda f: f["glasses"],
        "beard": lambda f: f["beard"],
        "smile": lambda f: f["smile"],
        "direct_gaze": lambda f: 1 - np.abs(f["gaze"]),
        "background_warmth": lambda f: faces.BACKGROUND_WARMTH[f["background"]],
        "light_warmth": lambda f: f["light_warmth"],
        "light_strength": lambda f: f["light_strength"],
    },
    "churches": {
        "taste": churches.taste,
        "night": lambda f: f["time"] == churches.NIGHT,
        "sunset": lambda f: f["time"] == SUNSET,
        "light": lambda f: f["light"],
        "clouds": lambda f: f["clouds"],
        "trees": lambda f: f["trees"],
        "windows": lambda f: f["windows"],
        "lit": lambda f: f["lit"],
        "ornament": lambda f: f["ornament"],
        "brick": lambda f: f["material"] == 2,
        "dome": lambda f: f["dome"],
        "hills": lambda f: f["backdrop"] == 1,
        "tower_height": lambda f: f["tower_height"],
    },
}


@dataclass(frozen=True)
class Regressor:
    """A frozen network with the names of what it estimates."""

    model: nn.Module
    """Pictures (N, 3, 64, 64) in [-1, 1] to standardised estimates (N, all outputs)."""
    outputs: dict[str, list[str]]
    """Names per domain, in the order of the network's outputs."""
    scale: dict[str, list[list[float]]]
    """Per domain, each output's mean and standard deviation over natural pictures."""


def estimate(
    regressor: Regressor, images: torch.Tensor, domain: str, batch_size: int = 250
) -> dict[str, torch.Tensor]:
    """Estimate what is true of pictures.

    Args:
        images: float batch (N, 3, 64, 64) in [-1, 1].
        domain: "faces" or "churches".

    Returns:
        name to (N,) values in standard deviations from the mean of natural pictures; "taste" alone
        is in the rater's own unit, which is about the same.
    """
    names = list(regressor.outputs)
    if domain not in names:
        raise ValueError(f"unknown domain {domain!r}; the regressor knows {', '.join(names)}")
    device = next(regressor.model.parameters()).device
    with torch.no_grad():
        parts = [regressor.model(part.to(device)) for part in images.split(batch_size)]
    first = sum(len(regressor.outputs[name]) for name in names[: names.index(domain)])
    columns = torch.cat(parts)[:, first:].unbind(dim=1)
    return dict(zip(regressor.outputs[domain], columns, strict=False))


def read(regressor: Regressor, images: torch.Tensor, domain: str) -> dict[str, torch.Tensor]:
    """`estimate` in each factor's own unit, as in `TARGETS`: name to (N,) float64 on the CPU."""
    scale = dict(zip(regressor.outputs[domain], regressor.scale[domain], strict=True))
    seen = estimate(regressor, images, domain).items()
    return {name: values.double().cpu() * scale[name][1] + scale[name][0] for name, values in seen}


def load_regressor(folder: str | Path, device: str | None = None) -> Regressor:
    """Load a regressor from `model.safetensors` and `config.json`.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the files are truncated or belong to another model.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not a regressor's folder: {name} is missing. `make toy` rebuilds it"
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        outputs = config["outputs"]
        model = _network(sum(map(len, outputs.values())))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:
        raise ValueError(
            f"{folder} cannot be read as a regressor: its files are truncated or belong to another "
            f"model. `make toy` rebuilds it. Cause: {type(error).__name__}: {error}"
        ) from error
    model = model.to(device or DEVICE).eval().requires_grad_(False)
    return Regressor(model, outputs, config["scale"])


def train_regressor(
    drawn: list[Drawn], folder: Path, seed: int, n_steps: int = REGRESSOR_STEPS
) -> None:
    """Train the regressor on one set of pictures per domain and save it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    outputs = {part.domain: list(TARGETS[part.domain]) for part in drawn}
    scale = {domain: _natural_scale(domain, rng) for domain in outputs}
    targets = []
    for part in drawn:
        mean, sd = np.array(scale[part.domain]).T
        standardised = (_true_values(part.domain, part.factors) - mean) / sd
        targets.append(torch.from_numpy(standardised).float().to(DEVICE))
    model = _network(sum(map(len, outputs.values()))).to(DEVICE)
    widths = [target.shape[1] for target in targets]

    def loss() -> torch.Tensor:
        batches = [pick(part, BATCH_SIZE // len(drawn), rng) for part in drawn]
        estimates = model(torch.cat([pictures for pictures, _ in batches])).float()
        own = [
            rows.split(widths, dim=1)[i]  # a picture is asked about its own domain only
            for i, rows in enumerate(estimates.chunk(len(drawn)))
        ]
        return sum(
            F.mse_loss(mine, target[places])
            for mine, target, (_, places) in zip(own, targets, batches, strict=True)
        ) / len(drawn)

    fit(model, loss, n_steps, 2e-3, "the regressor")
    save_file(model.cpu().state_dict(), folder / "model.safetensors")
    config = {"outputs": outputs, "scale": scale}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _true_values(domain: str, factors: dict[str, np.ndarray]) -> np.ndarray:
    """Unscaled targets (N, outputs of the domain)."""
    return np.stack([of(factors).astype(float) for of in TARGETS[domain].values()], axis=1)


def _natural_scale(domain: str, rng: np.random.Generator) -> list[list[float]]:
    """Mean and standard deviation of each target; 0 and 1 for taste, which has its own unit."""
    values = _true_values(domain, DOMAINS[domain].sample_factors(20_000, rng))
    scale = np.stack([values.mean(axis=0), values.std(axis=0)], axis=1)
    scale[list(TARGETS[domain]).index("taste")] = 0, 1
    return scale.round(4).tolist()


def _network(n_outputs: int) -> nn.Sequential:
    """Five convolutions, all but the first strided, and two linear layers, 0.3 M parameters."""
    layers, channels = [], (3, 16, 32, 64, 96, 112)
    for i, (inward, outward) in enumerate(zip(channels, channels[1:], strict=False)):
        layers += [
            nn.Conv2d(inward, outward, 3, stride=1 if i == 0 else 2, padding=1),
            nn.BatchNorm2d(outward),
            nn.GELU(),
        ]
    layers += [nn.Flatten(), nn.Linear(112 * 4 * 4, 64), nn.GELU(), nn.Linear(64, n_outputs)]
    return nn.Sequential(*layers)
