"""Rewards: an image batch in, one number per picture out.

A reward is any callable from a float batch (N, C, H, W) in [-1, 1] to (N,) finite numbers. The
registry holds the thesis's five; a parameter "package.module:function" names a reader's own.
"""

import functools
import importlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from ddpo_lib import encoders, paths
from ddpo_lib.config import CHOICES, Models

Reward = Callable[[torch.Tensor], torch.Tensor]


def to_uint8(images: torch.Tensor, encoding: str = "rescaled") -> torch.Tensor:
    """(N, C, H, W) in [-1, 1] → (N, H, W, C) uint8 on the CPU.

    Args:
        encoding: "rescaled" maps [-1, 1] to 0…255. "published" repeats the thesis's code, which
            multiplies by 255 and clamps, so that everything below mid-grey turns black.
    """
    if encoding not in CHOICES["jpeg_encoding"]:
        raise ValueError(f"JPEG encoding {encoding!r}: must be one of {CHOICES['jpeg_encoding']}")
    scaled = (images / 2 + 0.5) * 255 if encoding == "rescaled" else images * 255
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def from_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_uint8`: (N, H, W, C) uint8 → (N, C, H, W) float32 in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def jpeg_kilobytes(images: torch.Tensor, encoding: str = "rescaled") -> torch.Tensor:
    """Size of each picture as a JPEG of quality 95, in kB of 1000 bytes, (N,) float32.

    "published" is there to compare with the thesis's numbers (17.26 kB for its faces).
    """
    with ThreadPoolExecutor() as pool:  # the encoder lets go of the interpreter
        sizes = list(pool.map(_jpeg_bytes, to_uint8(images, encoding).numpy()))
    return torch.tensor(sizes, device=images.device) / 1000


def _jpeg_bytes(picture: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(picture.squeeze()).save(buffer, format="JPEG", quality=95)
    return buffer.tell()


def jpeg_compressibility(images: torch.Tensor, encoding: str = "rescaled") -> torch.Tensor:
    """Minus the JPEG's size in kB (section 5.1.1): higher is smaller."""
    return -jpeg_kilobytes(images, encoding)


def jpeg_incompressibility(images: torch.Tensor, encoding: str = "rescaled") -> torch.Tensor:
    """The JPEG's size in kB (section 5.1.2): higher is larger."""
    return jpeg_kilobytes(images, encoding)


def aesthetic(models: Models, device: str | None = None) -> Reward:
    """Score of the aesthetic head on normalised CLIP embeddings (section 5.1.3), about 1…10."""
    clip = encoders.load_clip(paths.resolve(models.clip), device)
    head = encoders.load_aesthetic_head(paths.resolve(models.aesthetic), device)
    return lambda images: head(encoders.embed_images(clip, images))


def over50(models: Models, device: str | None = None) -> Reward:
    """Sum of the age classifier's *logits* of 50–59, 60–69 and 70 or more (section 5.1.4)."""
    return _age_reward(models, encoders.OVER50, device)


def under30(models: Models, device: str | None = None) -> Reward:
    """Sum of the age classifier's *logits* of the four classes below 30."""
    return _age_reward(models, encoders.UNDER30, device)


def _age_reward(models: Models, classes, device: str | None) -> Reward:
    classifier = encoders.load_age_classifier(paths.resolve(models.age), device)
    return lambda images: encoders.age_logits(classifier, images)[:, list(classes)].sum(1)


JPEG = {
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
}
LEARNED = {"aesthetic": aesthetic, "over50": over50, "under30": under30}
REWARDS = (*JPEG, *LEARNED)


def load(
    name: str, models: Models, device: str | None = None, jpeg_encoding: str = "rescaled"
) -> Reward:
    """The reward called `name`, checked on every call.

    Args:
        name: one of `REWARDS`, or "package.module:function" for any importable callable.
        models: where the learned rewards find their networks.
        device: for those networks; by default a GPU if there is one.

    Raises:
        ValueError: no such reward. Called, the result raises ValueError where the reward returns a
            wrong shape or a value that is not finite, and RuntimeError where it raises.
    """
    if name in JPEG:
        reward = functools.partial(JPEG[name], encoding=jpeg_encoding)
    elif name in LEARNED:
        reward = LEARNED[name](models, device)
    else:
        reward = _import(name)

    @torch.no_grad()
    def checked(images: torch.Tensor) -> torch.Tensor:
        try:
            values = torch.as_tensor(reward(images), dtype=torch.float32, device=images.device)
        except Exception as error:
            raise RuntimeError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
        if values.shape != (len(images),):
            raise ValueError(
                f"reward {name!r} returned shape {tuple(values.shape)} for {len(images)} pictures: "
                f"it must return one number each, shape ({len(images)},)"
            )
        if not values.isfinite().all():
            bad = (~values.isfinite()).nonzero().view(-1).tolist()
            raise ValueError(
                f"reward {name!r} is not finite for pictures {bad[:10]}: {values[bad[0]]}"
            )
        return values

    return checked


def _import(name: str) -> Reward:
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(
            f"unknown reward {name!r}: choose one of {REWARDS}, or name your own as "
            "'package.module:function'"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot import the reward {name!r}: {error}. The module must be importable from the "
            "notebook's kernel (installed, or its folder on PYTHONPATH)"
        ) from error
