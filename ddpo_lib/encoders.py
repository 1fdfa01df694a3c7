"""Frozen networks that look at pictures: CLIP, the aesthetic head on top of it, the age classifier.

All take a float batch (N, 3, H, W) in [-1, 1] of any square size and are differentiable with
respect to it, because their preprocessing works on tensors. The loaders read the toy world's
folders and the real checkpoints alike.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import ViTForImageClassification, ViTImageProcessor

from ddpo_lib import hub

AGE_CLASSES = (
    "0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70",
)  # fmt: skip
"""FairFace's nine age classes, in the order of the classifier's logits."""
UNDER30 = (0, 1, 2, 3)
OVER50 = (6, 7, 8)

LAION_HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
"""Of the published file, `hub.LAION_HEAD`."""

Numbers = tuple[float, float, float]


@dataclass(frozen=True)
class Clip:
    """A contrastive image and text encoder with what its inputs need."""

    model: nn.Module
    """An open_clip model with frozen weights."""
    tokenizer: object
    """Takes a list of texts, gives int64 tokens (N, context length)."""
    image_size: int
    """Side of the square picture that the image tower takes, in pixels."""
    mean: Numbers
    """Per channel, of pictures in [0, 1]."""
    std: Numbers


@dataclass(frozen=True)
class AgeClassifier:
    """A vision transformer with FairFace's nine age classes, with what its inputs need."""

    model: ViTForImageClassification
    """Frozen weights."""
    image_size: int
    """Side of the square picture that it takes, in pixels."""
    mean: Numbers
    """Per channel, of pictures in [0, 1]."""
    std: Numbers


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
    """Load CLIP with open_clip.

    Args:
        source: a folder with `open_clip_config.json` and `open_clip_model.safetensors`, or
            "architecture:pretrained" such as "ViT-L-14:openai", with a revision of its repository
            on the Hub after an @ if it is not to be the newest.
        device: "cpu", "cuda", …; default: a GPU if there is one.

    Raises:
        FileNotFoundError: no such folder or pretrained model, or the Hub did not give it.
        ValueError: the folder's files do not make a CLIP model, or are truncated.
    """
    source = str(source)
    architecture, _, tag = source.partition("@")[0].rpartition(":")
    if Path(source).is_dir():
        weights = Path(source) / "open_clip_model.safetensors"
        _require(weights, "a CLIP folder", "open_clip_config.json")
        name, options = f"local-dir:{Path(source).resolve()}", {}
    elif (architecture, tag) in open_clip.list_pretrained():
        recipe = open_clip.get_pretrained_cfg(architecture, tag)
        name, options = architecture, {
            "pretrained": str(hub.fetch("clip", source)),
            # OpenAI's weights want the activation they were trained with; open_clip only warns.
            "force_quick_gelu": recipe.get("quick_gelu", False),
            "image_mean": recipe["mean"],
            "image_std": recipe["std"],
        }  # fmt: skip
    else:
        raise FileNotFoundError(
            f"no CLIP model at {source!r}. Give a folder in open_clip's format or "
            "'architecture:pretrained', for instance 'ViT-L-14:openai'; "
            "open_clip.list_pretrained() names them all"
        )
    try:
        model, _, _ = open_clip.create_model_and_transforms(
            name, require_pretrained=True, **options
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise _unreadable(source, "a CLIP model", error) from error
    preprocess = open_clip.get_model_preprocess_cfg(model)
    size = preprocess["size"]
    size = size if isinstance(size, int) else size[0]
    return Clip(
        _freeze(model, device), tokenizer, size, tuple(preprocess["mean"]), tuple(preprocess["std"])
    )


def embed_images(clip: Clip, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """L2-normalised CLIP embeddings (N, D) of a float batch (N, 3, H, W) in [-1, 1]."""
    embeddings = [
        clip.model.encode_image(_prepare(part, clip, _resize))
        for part in _on(clip.model, images).split(batch_size)
    ]
    return F.normalize(torch.cat(embeddings), dim=-1)


def embed_texts(clip: Clip, texts: list[str]) -> torch.Tensor:
    """L2-normalised CLIP embeddings (N, D) of texts."""
    tokens = clip.tokenizer(list(texts))
    return F.normalize(clip.model.encode_text(_on(clip.model, tokens)), dim=-1)


def load_aesthetic_head(source: str | Path, device: str | None = None) -> AestheticHead:
    """Load an aesthetic head; its input size is read from the weights.

    Args:
        source: a folder with `model.safetensors`; the file that LAION published, "….pth"; or the id
            of a repository on the Hub that holds either.
        device: "cpu", "cuda", …; default: a GPU if there is one.

    Raises:
        FileNotFoundError: no such file, or the Hub did not give it.
        ValueError: the file is truncated, holds another model, or is a .pth but not LAION's.
    """
    weights = hub.fetch("aesthetic", str(source))
    if weights.suffix not in (".pth", ".safetensors"):
        weights = weights / "model.safetensors"
    _require(weights, "an aesthetic head's folder")
    if weights.suffix == ".pth":
        _check_sha256(weights, LAION_HEAD_SHA256)
    try:
        if weights.suffix == ".pth":
            state = torch.load(weights, "cpu", weights_only=True)
        else:
            state = load_file(weights)
        head = AestheticHead(state["layers.0.weight"].shape[1])
        head.load_state_dict(state)
    except Exception as error:
        raise _unreadable(source, "an aesthetic head (layers.{0,2,4,6,7}.*)", error) from error
    return _freeze(head, device)


def load_age_classifier(source: str | Path, device: str | None = None) -> AgeClassifier:
    """Load an age classifier from a transformers folder or a Hub id ("nateraw/vit-age-classifier").

    Raises:
        FileNotFoundError: neither a folder nor a model that the Hub can give.
        ValueError: the model is truncated or not a ViT with FairFace's nine age classes.
    """
    if hub.locate(str(source)) is None and not Path(source).is_dir():
        raise FileNotFoundError(
            f"no age classifier at {str(source)!r}. Give a transformers folder or a Hub id such as "
            "'nateraw/vit-age-classifier'"
        )
    folder = hub.fetch("age", str(source))
    _require(folder / "model.safetensors", "an age classifier's folder", "config.json")
    try:
        model, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
        processor = ViTImageProcessor.from_pretrained(folder)
    except Exception as error:
        raise _unreadable(source, "a ViTForImageClassification", error) from error
    labels = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    if labels != AGE_CLASSES or report["missing_keys"]:
        raise ValueError(
            f"{source}: not an age classifier with the nine classes {', '.join(AGE_CLASSES)}; it "
            f"has {', '.join(labels)} and lacks {len(report['missing_keys'])} of the weights"
        )
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return AgeClassifier(_freeze(model, device), processor.size["height"], mean, std)


def age_logits(
    classifier: AgeClassifier, images: torch.Tensor, batch_size: int = 250
) -> torch.Tensor:
    """Logits (N, 9) over AGE_CLASSES of a float batch (N, 3, H, W) in [-1, 1]."""
    logits = [
        classifier.model(pixel_values=_prepare(part, classifier, _resize_levels)).logits
        for part in _on(classifier.model, images).split(batch_size)
    ]
    return torch.cat(logits)


def _prepare(images: torch.Tensor, encoder: Clip | AgeClassifier, resize) -> torch.Tensor:
    """Resize and standardise: what image processors do, on tensors."""
    size = encoder.image_size
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"expected square RGB pictures (N, 3, S, S), got {tuple(images.shape)}")
    if images.shape[-1] != size:
        images = resize(images, size)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    return ((images + 1) / 2 - mean) / std


def _resize(images: torch.Tensor, size: int, mode: str = "bicubic") -> torch.Tensor:
    """As CLIP's preprocessing does, but for its rounding and clamping to 8 bits."""
    return F.interpolate(images, (size, size), mode=mode, antialias=True, align_corners=False)


def _resize_levels(images: torch.Tensor, size: int) -> torch.Tensor:
    """As image processors of transformers do: of 8-bit pictures, to 8-bit pictures.

    The gradient is that of a resize without rounding.
    """
    smooth = _resize(images, size, "bilinear")
    # The 8-bit kernel is the CPU's alone.
    levels = ((images.detach() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    rounded = _resize(levels, size, "bilinear").to(images) / 127.5 - 1
    return smooth + (rounded - smooth).detach()


def _on(model: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(next(model.parameters()).device)


def _freeze(model: nn.Module, device: str | None) -> nn.Module:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval().requires_grad_(False)


def _require(weights: Path, kind: str, config: str | None = None) -> None:
    """Raise FileNotFoundError unless the weights, and the config beside them, are there."""
    for path in filter(None, (weights, config and weights.with_name(config))):
        if not path.is_file():
            raise FileNotFoundError(
                f"{weights.parent} is not {kind}: {path.name} is missing. "
                "`make toy` rebuilds the toy models; git brings back the shipped ones"
            )
    if config:
        try:
            json.loads(weights.with_name(config).read_text())
        except json.JSONDecodeError as error:
            raise _unreadable(weights.parent, kind, error) from error


def _check_sha256(file: Path, expected: str) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"{file} is not the head that LAION published, {hub.LAION_HEAD}: its sha256 is {found} "
            f"and not {expected}. Fetch it again; save a head of your own as model.safetensors"
        )


def _unreadable(source: str | Path, kind: str, error: Exception) -> ValueError:
    return ValueError(
        f"{source} cannot be read as {kind}: its files are truncated or belong to another model. "
        f"Fetch it again, or rebuild the toy models with `make toy`. Cause: {hub.cause(error)}"
    )
