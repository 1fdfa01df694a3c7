"""Frozen networks that look at images: CLIP, the aesthetic head on top of it, the age classifier.

All take float images (N, 3, S, S) in [-1, 1] of any size S and are differentiable with respect to
them, because their preprocessing works on tensors. The loaders take a source, see `hub`, and a
device, by default a GPU if there is one. They raise FileNotFoundError where the source does not
exist or the Hub did not give it, and ValueError where its files are damaged or another model's.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ddpo_lib import hub

AGE_CLASSES = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
"""FairFace's nine age classes, in the order of the classifier's logits."""
UNDER30 = (0, 1, 2, 3)
OVER50 = (6, 7, 8)
LAION_HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


@dataclass(frozen=True)
class Clip:
    """An open_clip model with frozen weights, and what its inputs need."""

    model: nn.Module
    # Of texts gives int64 tokens (N, context length); compared, it would bring its folder's path.
    tokenizer: object = field(repr=False, compare=False)
    image_size: int  # side of the square that the image tower takes, in pixels
    mean: tuple[float, float, float]  # per channel, of images in [0, 1]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class AgeClassifier:
    """A frozen `ViTForImageClassification` of `AGE_CLASSES`, and what its inputs need."""

    model: nn.Module
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor: normalised CLIP embeddings (N, D) to scores (N,), about 1 to 10.

    The layers and their names are those of "sac+logos+ava1-l14-linearMSE", whose weights load here.
    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor
    """

    def __init__(self, input_size: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_size, 1024), nn.Dropout(0.2),
            nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.layers(embeddings).squeeze(-1)


def load_clip(source: str | Path, device: str | None = None) -> Clip:
    """Load CLIP with open_clip, from a folder in its format or by its name, "ViT-L-14:openai"."""
    import open_clip

    source = str(source)
    architecture, _, tag = source.partition("@")[0].rpartition(":")
    if Path(source).is_dir():
        folder = Path(source).resolve()
        _require(folder, "a CLIP folder", "open_clip_config.json", "open_clip_model.safetensors")
        name, options = f"local-dir:{folder}", {}
    elif (architecture, tag) in open_clip.list_pretrained():
        recipe = open_clip.get_pretrained_cfg(architecture, tag)
        name, options = architecture, {"pretrained": str(hub.fetch("clip", source))}
        options |= {"image_mean": recipe["mean"], "image_std": recipe["std"]}
        # OpenAI's weights want the activation they were trained with; open_clip only warns.
        options["force_quick_gelu"] = recipe.get("quick_gelu", False)
    else:
        needed = "a folder in open_clip's format or a name such as 'ViT-L-14:openai'"
        raise FileNotFoundError(f"no CLIP model at {source!r}: give {needed}")
    try:
        model = open_clip.create_model_and_transforms(name, require_pretrained=True, **options)[0]
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise _unreadable(source, "a CLIP model", error) from error
    preprocess = open_clip.get_model_preprocess_cfg(model)
    mean, std, size = (preprocess[key] for key in ("mean", "std", "size"))
    size = size if isinstance(size, int) else size[0]
    return Clip(_frozen(model, device), tokenizer, size, tuple(mean), tuple(std))


def embed_images(clip: Clip, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """L2-normalised CLIP embeddings (N, D) of float images (N, 3, S, S) in [-1, 1]."""
    parts = _on(clip.model, images).split(batch_size)
    embeddings = [clip.model.encode_image(_prepare(part, clip, _resize)) for part in parts]
    return F.normalize(torch.cat(embeddings), dim=-1)


def embed_texts(clip: Clip, texts: list[str]) -> torch.Tensor:
    """L2-normalised CLIP embeddings (N, D) of texts."""
    if isinstance(texts, str) or not texts or not all(isinstance(each, str) for each in texts):
        raise ValueError(f"texts={texts!r}: must be a list of texts")
    tokens = clip.tokenizer(list(texts))
    return F.normalize(clip.model.encode_text(_on(clip.model, tokens)), dim=-1)


def load_aesthetic_head(source: str | Path, device: str | None = None) -> AestheticHead:
    """Load an aesthetic head: `model.safetensors` in a folder, or the .pth that LAION published."""
    weights = hub.fetch("aesthetic", str(source))
    if weights.suffix not in (".pth", ".safetensors"):
        weights = weights / "model.safetensors"
    _require(weights.parent, "an aesthetic head's folder", weights.name)
    pickled = weights.suffix == ".pth"
    if pickled and (found := hashlib.sha256(weights.read_bytes()).hexdigest()) != LAION_HEAD_SHA256:
        title = f"{weights} is not the head that LAION published: its sha256 is {found}"
        raise ValueError(f"{title}. Fetch it again; save a head of your own as model.safetensors")
    try:
        state = torch.load(weights, "cpu", weights_only=True) if pickled else load_file(weights)
        head = AestheticHead(state["layers.0.weight"].shape[1])
        head.load_state_dict(state)
    except Exception as error:
        raise _unreadable(source, "an aesthetic head (layers.{0,2,4,6,7}.*)", error) from error
    return _frozen(head, device)


def load_age_classifier(source: str | Path, device: str | None = None) -> AgeClassifier:
    """Load an age classifier from a transformers folder, or "nateraw/vit-age-classifier"."""
    folder = hub.fetch("age", str(source))
    kind = "an age classifier's folder, nor an id such as 'nateraw/vit-age-classifier'"
    _require(folder, kind, "config.json", "model.safetensors")
    from transformers import ViTForImageClassification, ViTImageProcessor
    from transformers.utils import logging

    # Reading files takes a moment; a download, which takes longer, shows the Hub's own bar.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
        processor = ViTImageProcessor.from_pretrained(folder)
    except Exception as error:
        raise _unreadable(source, "a ViTForImageClassification", error) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    labels = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    if labels != AGE_CLASSES or report["missing_keys"]:
        needed, found = f"the nine classes {', '.join(AGE_CLASSES)}", ", ".join(labels)
        lacks = f"lacks {len(report['missing_keys'])} of the weights"
        raise ValueError(f"{source}: no age classifier of {needed}; it has {found} and {lacks}")
    mean, std, size = processor.image_mean, processor.image_std, processor.size["height"]
    return AgeClassifier(_frozen(model, device), size, tuple(mean), tuple(std))


def age_logits(classifier: AgeClassifier, images, batch_size: int = 250) -> torch.Tensor:
    """Logits (N, 9) over AGE_CLASSES of float images (N, 3, S, S) in [-1, 1]."""
    model, parts = classifier.model, _on(classifier.model, images).split(batch_size)
    ready = (_prepare(part, classifier, _resize_levels) for part in parts)
    return torch.cat([model(pixel_values=part).logits for part in ready])


def can_see(channels: int, height: int, width: int) -> bool:
    """Whether these networks take images of this shape: square ones in colour."""
    return channels == 3 and height == width


def _prepare(images: torch.Tensor, encoder: Clip | AgeClassifier, resize) -> torch.Tensor:
    """Resize and standardise: what image processors do, on tensors."""
    if images.ndim != 4 or not can_see(*images.shape[1:]):
        raise ValueError(f"expected square RGB images (N, 3, S, S), got {tuple(images.shape)}")
    if images.shape[-1] != encoder.image_size:
        images = resize(images, encoder.image_size)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    return ((images + 1) / 2 - mean) / std


def _resize(images: torch.Tensor, size: int, mode: str = "bicubic") -> torch.Tensor:
    """As CLIP's preprocessing does, but for its rounding and clamping to 8 bits."""
    return F.interpolate(images, (size, size), mode=mode, antialias=True, align_corners=False)


def _resize_levels(images: torch.Tensor, size: int) -> torch.Tensor:
    """As image processors of transformers do, of 8-bit images to 8-bit images, with the gradient of
    a resize without rounding."""
    smooth = _resize(images, size, "bilinear")
    # The 8-bit kernel is the CPU's alone.
    levels = ((images.detach() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    rounded = _resize(levels, size, "bilinear").to(images) / 127.5 - 1
    return smooth + (rounded - smooth).detach()


def _on(model: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(next(model.parameters()).device)


def _frozen(model: nn.Module, device: str | None) -> nn.Module:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval().requires_grad_(False)


def _require(folder: Path, kind: str, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not {kind}: {name} is missing. Fetch it again")


def _unreadable(source: str | Path, kind: str, error: Exception) -> ValueError:
    reason = "its files are truncated or another model's. Fetch it again"
    return ValueError(f"{source} cannot be read as {kind}: {reason}. Cause: {hub.cause(error)}")
