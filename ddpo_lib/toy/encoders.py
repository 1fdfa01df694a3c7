"""Train and save the toy CLIP and the toy age classifier, in the formats of the real ones."""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from ddpo_lib.encoders import AGE_CLASSES
from ddpo_lib.toy.faces import AGE_BOUNDS
from ddpo_lib.toy.training import DEVICE, DOMAINS, Drawn, fit, pick

CLIP_STEPS, AGE_STEPS = 900, 900
BATCH_SIZE = 128
CONTEXT_LENGTH = 32

VISION = {"image_size": 32, "patch_size": 4, "width": 96, "layers": 4, "head_width": 32}
TEXT = {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 2, "layers": 2}
EMBED_DIM = 128
HALVES = [0.5, 0.5, 0.5]


def train_clip(drawn: list[Drawn], folder: Path, seed: int, n_steps: int = CLIP_STEPS) -> None:
    """Train CLIP contrastively on pictures and their captions, and save it in open_clip's format.

    Every batch holds equally many pictures of each domain. Half of the captions are shortened to a
    few of their phrases, so that zero-shot prompts, which are short, resemble what was learned.

    Args:
        drawn: one set of pictures per domain.
        folder: where `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer go.

    Source: Radford et al. 2021, figure 3.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    captions = [DOMAINS[part.domain].captions(part.factors, rng) for part in drawn]
    tokenizer = _word_tokenizer([text for texts in captions for text in texts])
    tokenizer.save_pretrained(folder)
    text_cfg = TEXT | {"vocab_size": len(tokenizer), "hf_tokenizer_name": "word-level"}
    model_cfg = {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": text_cfg}
    model = open_clip.CLIP(**model_cfg).to(DEVICE)

    def loss() -> torch.Tensor:
        batches = [pick(part, BATCH_SIZE // len(drawn), rng) for part in drawn]
        chosen = [
            _shorten(texts[i], rng)
            for texts, (_, places) in zip(captions, batches, strict=True)
            for i in places
        ]
        tokens = tokenizer(
            chosen, return_tensors="pt", padding="max_length", truncation=True,
            max_length=CONTEXT_LENGTH,
        ).input_ids  # fmt: skip
        pictures = torch.cat([pictures for pictures, _ in batches])
        image, text, scale = model(pictures, tokens.to(DEVICE))
        logits = scale.clamp(max=100) * image.float() @ text.float().T
        own = torch.arange(len(logits), device=DEVICE)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    fit(model, loss, n_steps, 2e-3, "CLIP")
    preprocess_cfg = {"mean": HALVES, "std": HALVES, "size": 32, "interpolation": "bicubic"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def _shorten(caption: str, rng: np.random.Generator) -> str:
    """Half of the time the whole caption, else only a random few of its phrases, in order."""
    if rng.random() < 0.5:
        return caption
    phrases = caption.split(", ")
    kept = rng.random(len(phrases)) < rng.uniform(0.1, 0.5)
    kept[rng.integers(len(phrases))] = True
    return ", ".join(phrase for phrase, keep in zip(phrases, kept, strict=True) if keep)


def _word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends each text with [EOS], the highest id.

    open_clip's text tower reads its output at the highest token of a text.
    """
    prompts = [
        prompt
        for domain in DOMAINS.values()
        for positive, negative, _ in domain.ATTRIBUTES.values()
        for prompt in (positive, negative)
    ]
    normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z]+"), " ")]
    )
    words = {word for text in set(texts) | set(prompts) for word in normalizer.normalize_str(text).split()}
    vocabulary = ["[PAD]", "[UNK]", *sorted(words), "[EOS]"]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", ids["[EOS]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


def age_class(age: np.ndarray) -> np.ndarray:
    """FairFace classes (N,), 0 to 8, of ages (N,) in years."""
    return np.searchsorted(AGE_BOUNDS, age, side="right") - 1


def train_age_classifier(drawn: Drawn, folder: Path, seed: int, n_steps: int = AGE_STEPS) -> None:
    """Train a small ViT on FairFace's nine age classes and save it as transformers does.

    Args:
        drawn: faces, best with uniform age classes for the most part.
        folder: where `config.json`, `model.safetensors` and `preprocessor_config.json` go.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    classes = torch.from_numpy(age_class(drawn.factors["age"])).to(DEVICE)
    labels = dict(enumerate(AGE_CLASSES))
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=3,
        intermediate_size=384, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=labels, label2id={label: i for i, label in labels.items()},
    )  # fmt: skip
    model = ViTForImageClassification(config).to(DEVICE)

    def loss() -> torch.Tensor:
        pictures, places = pick(drawn, BATCH_SIZE, rng)
        return F.cross_entropy(model(pixel_values=pictures).logits.float(), classes[places])

    fit(model, loss, n_steps, 1e-3, "age")
    model.cpu().save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=HALVES, image_std=HALVES).save_pretrained(folder)
