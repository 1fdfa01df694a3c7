"""Rewards: images in, or images and prompts, and one finite number per image out.

A reward is any callable of float images (N, C, H, W) in [-1, 1], or of those and N prompts, higher
where it is better: a function in a notebook cell is one. The loop calls it through `checked`.
"""

import contextlib
import functools
import importlib
import inspect
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from ddpo_lib import encoders

Reward = Callable[..., torch.Tensor]
ENCODINGS = ("rescaled", "published")
MODELS = {"aesthetic": ("clip", "aesthetic"), "over50": ("age",), "under30": ("age",)}
MODELS |= {"clip_alignment": ("clip",)}
"""Learned reward → the models that it looks through."""


def to_uint8(images: torch.Tensor, encoding: str = "rescaled") -> torch.Tensor:
    """Float images (N, C, H, W) in [-1, 1] → (N, H, W, C) uint8 on the CPU.

    The encoding "rescaled" maps [-1, 1] to 0…255. "published" repeats the thesis's code, which
    multiplies by 255 and clamps, so that everything below mid-grey turns black.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"JPEG encoding {encoding!r}: must be one of {ENCODINGS}")
    check_images(images)
    scaled = (images / 2 + 0.5) * 255 if encoding == "rescaled" else images * 255
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_uint8`: (N, H, W, C) uint8 → (N, C, H, W) float32 in [-1, 1]."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"expected a uint8 tensor (N, H, W, C), got {_kind(images)}")
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def check_images(images: torch.Tensor) -> None:
    """Raise ValueError for what is no float tensor (N, C, H, W), and for grey levels 0…255;
    FloatingPointError for images that are not finite, which it names."""
    if not (isinstance(images, torch.Tensor) and images.is_floating_point() and images.ndim == 4):
        found = f"got {_kind(images)}; of uint8 images, rewards.from_uint8 makes one"
        raise ValueError(f"expected a float tensor (N, C, H, W) in [-1, 1], {found}")
    if bad := _not_finite(images):
        advice = "lower the learning rate or the guidance, or set bf16 to false"
        raise FloatingPointError(f"images {bad} are not finite: what drew them diverges; {advice}")
    # A policy may leave [-1, 1], by far if it does not clip, but then to both sides.
    if images.numel() and images.min() >= 0 and images.max() > 10:
        found = f"{images.min():.3g} to {images.max():.3g}"
        raise ValueError(f"expected images in [-1, 1], got {found}: divide by 127.5, subtract 1")


def jpeg_kilobytes(images: torch.Tensor, encoding: str = "rescaled") -> torch.Tensor:
    """Size of each image (N, 1 or 3, H, W) as a JPEG of quality 95, in kB of 1000 bytes, (N,).

    The encoding "published", see `to_uint8`, is for the thesis's numbers (17.26 kB for its faces).
    """
    levels = to_uint8(images, encoding)
    if (channels := levels.shape[-1]) not in (1, 3):
        raise ValueError(f"JPEG files have 1 or 3 channels, not {channels}")
    with ThreadPoolExecutor() as pool:  # the encoder lets go of the interpreter
        sizes = [len(file) for file in pool.map(_jpeg, levels.squeeze(-1).numpy())]
    return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000


def jpeg_header_kilobytes(channels: int = 3) -> float:
    """What every JPEG file of `jpeg_kilobytes` has, whatever its image: markers and tables, kB."""
    file = _jpeg(np.zeros((8, 8) if channels == 1 else (8, 8, 3), np.uint8))
    scan = file.index(b"\xff\xda") + 2  # after it come two bytes with the segment's length
    end_marker = 2
    return (scan + int.from_bytes(file[scan : scan + 2]) + end_marker) / 1000


def _jpeg(levels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def jpeg_compressibility(images: torch.Tensor, encoding: str = "rescaled") -> torch.Tensor:
    """Minus the JPEG's size in kB (section 5.1.1): higher is smaller."""
    return -jpeg_kilobytes(images, encoding)


def jpeg_incompressibility(images: torch.Tensor, encoding: str = "rescaled") -> torch.Tensor:
    """The JPEG's size in kB (section 5.1.2): higher is larger."""
    return jpeg_kilobytes(images, encoding)


def aesthetic(clip: encoders.Clip, head: encoders.AestheticHead) -> Reward:
    """Score of the aesthetic head on normalised CLIP embeddings (section 5.1.3), about 1…10."""

    def aesthetic(images: torch.Tensor) -> torch.Tensor:
        check_images(images)
        return head(encoders.embed_images(clip, images))

    return aesthetic


def over50(classifier: encoders.AgeClassifier) -> Reward:
    """Sum of the age classifier's *logits* of 50–59, 60–69 and 70 or more (section 5.1.4)."""
    return _age("over50", classifier, encoders.OVER50)


def under30(classifier: encoders.AgeClassifier) -> Reward:
    """Sum of the age classifier's *logits* of the four classes below 30."""
    return _age("under30", classifier, encoders.UNDER30)


def _age(name: str, classifier: encoders.AgeClassifier, classes: Sequence[int]) -> Reward:
    def reward(images: torch.Tensor) -> torch.Tensor:
        check_images(images)
        return encoders.age_logits(classifier, images)[:, list(classes)].sum(1)

    reward.__name__ = name
    return reward


JPEG = {f.__name__: f for f in (jpeg_compressibility, jpeg_incompressibility)}
REWARDS = (*JPEG, *MODELS)


def load(name: str, models=None, device=None, jpeg_encoding: str = "rescaled") -> Reward:
    """The reward called `name`: one of `REWARDS`, or "package.module:function" for your own.

    A learned one needs the sources of its `MODELS`, name → source, and the device that they go to,
    see `encoders`; a JPEG reward the encoding, see `to_uint8`.
    """
    if name in JPEG:
        return functools.partial(JPEG[name], encoding=jpeg_encoding)
    if missing := [model for model in MODELS.get(name, ()) if not (models or {}).get(model)]:
        raise ValueError(f"the reward {name!r} looks through models: name a source of {missing}")
    if name == "aesthetic":
        clip = encoders.load_clip(models["clip"], device)
        return aesthetic(clip, encoders.load_aesthetic_head(models["aesthetic"], device))
    if name == "clip_alignment":
        from ddpo_lib import judges  # which builds on this module

        return judges.clip_alignment(encoders.load_clip(models["clip"], device))
    if name in MODELS:
        classifier = encoders.load_age_classifier(models["age"], device)
        return over50(classifier) if name == "over50" else under30(classifier)
    module, _, function = str(name).partition(":")
    if not (module and function):
        known = f"choose one of {REWARDS}, or your own as 'package.module:function'"
        raise ValueError(f"unknown reward {name!r}: {known}")
    try:
        reward = getattr(importlib.import_module(module), function)
    except Exception as error:
        needed = "The module must be installed, beside the notebook, or in a folder on PYTHONPATH"
        said = f"cannot import the reward {name!r}: {type(error).__name__}: {error}"
        raise ValueError(f"{said}. {needed}") from error
    if not callable(reward):
        raise ValueError(f"{name!r} is {reward!r}, no reward: it must be a function of images")
    return reward


def checked(reward: Reward) -> Callable[..., torch.Tensor]:
    """The reward as the loop calls it: scores(images, prompts=None) → (N,) float32, no gradient.

    Lists, NumPy arrays, integers and values that carry a gradient will do. `scores` refuses images
    as `check_images` does, and raises ValueError for anything but one real number per image,
    FloatingPointError for one that is not finite, RuntimeError where the reward itself raises.
    """
    title, reads_prompts = f"reward {name(reward)!r}", needs_prompts(reward)

    @torch.no_grad()
    def scores(images: torch.Tensor, prompts: Sequence[str] | None = None) -> torch.Tensor:
        check_images(images)
        n = len(images)
        if reads_prompts and len(prompts or ()) != n:
            raise ValueError(f"{title} reads prompts: {n} images and {len(prompts or ())} prompts")
        try:  # a copy, because a reward may work in place
            values = reward(images.clone(), *([prompts] if reads_prompts else []))
        except Exception as error:
            raise RuntimeError(f"{title} raised {type(error).__name__}: {error}") from error
        with contextlib.suppress(Exception):  # what is no tensor then is refused
            values = torch.as_tensor(values.copy() if isinstance(values, np.ndarray) else values)
        fits = isinstance(values, torch.Tensor) and values.shape == (n,)
        if not fits or values.is_complex() or values.dtype == torch.bool:
            needed = f"it must return one real number each, shape ({n},)"
            raise ValueError(f"{title} returned {_kind(values)} for {n} images: {needed}")
        values = values.detach().to(images.device, torch.float32)
        if bad := _not_finite(values[:, None]):
            advice = "let it return a number for every image, such as the worst"
            said = f"{title} is not finite for images {bad}: {values[bad[0]]}"
            raise FloatingPointError(f"{said}; {advice}")
        return values

    return scores


def needs_prompts(reward: Reward) -> bool:
    """Whether a reward is one of images and prompts, and not of images alone, by its parameters
    without a default. ValueError where it is neither."""
    # A network's own __call__ would take anything.
    called = reward.forward if isinstance(reward, torch.nn.Module) else reward
    parameters = inspect.signature(called).parameters.values() if callable(called) else ()
    positional = [p for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in positional if p.default is p.empty]
    if len(required) not in (1, 2):
        needed = "a function of (images), or of (images, prompts), and not"
        raise ValueError(f"{name(reward)!r} is no reward: {needed} of ({', '.join(required)})")
    return len(required) == 2


def name(reward: Reward) -> str:
    """What to call a reward."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def _not_finite(values: torch.Tensor) -> list[int]:
    """The first ten rows that have a NaN or an infinity."""
    return (~values.isfinite().flatten(1).all(1)).nonzero().view(-1).tolist()[:10]


def _kind(thing: object) -> str:
    if isinstance(thing, torch.Tensor | np.ndarray):
        return f"{thing.dtype} of shape {tuple(thing.shape)}"
    return type(thing).__name__
