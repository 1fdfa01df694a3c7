"""Train and save the toy CLIP and the toy age classifier, in the formats of the real ones."""

import json
import math
import re
from collections import Counter
from functools import partial
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

from ddpo_lib.encoders import AGE_CLASSES, Clip, embed_images, embed_texts
from ddpo_lib.toy.drawing import SIZE
from ddpo_lib.toy.faces import AGE_BOUNDS
from ddpo_lib.toy.training import DEVICE, DOMAINS, Drawn, fit, pick

CLIP_STEPS, AGE_STEPS = 2600, 600
BATCH_SIZE = 128
CONTEXT_LENGTH = 32
N_CAPTIONS = 8
SUBJECT = {"faces": "a person", "churches": "a church"}
RARE = 100  # phrases that are said of fewer pictures are left out

# timm's smallest plain convolutional network: with so few pictures it learns glasses and smiles,
# which take a vision transformer several times as long.
VISION = {
    "timm_model_name": "test_byobnet",
    "timm_pool": "abs_attn",
    "timm_proj": "linear",
    "image_size": SIZE,
}
TEXT = {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 2, "layers": 2}
EMBED_DIM = 256
PHRASE_END = re.compile(
    r", | with | and | (?=in daylight|at night|on the|in the)| (?=\w+ (?:hair|background))"
)
HALVES = (0.5, 0.5, 0.5)


def train_clip(drawn: list[Drawn], folder: Path, seed: int, n_steps: int = CLIP_STEPS) -> None:
    """Train CLIP contrastively on pictures and their captions, and save it in open_clip's format.

    Two losses are added. Whole captions are matched with their pictures by a softmax over the batch
    (Radford et al. 2021, figure 3). That alone learns details slowly, because a few easy attributes
    tell the pictures of a batch apart; so every picture is also matched with every phrase that
    captions are made of, each pair a yes or no (the sigmoid loss of Zhai et al. 2023). A phrase
    stands alone or with its subject, as in the short prompts that people write.

    Args:
        drawn: one set of pictures per domain; every batch holds equally many of each.
        folder: where `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer go.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    captions = _several_captions(drawn, rng)
    phrases, says = _phrases(captions)
    domains = [part.domain for part in drawn]
    subjects = [
        SUBJECT[next(name for name, own in zip(domains, says, strict=True) if own[:, j].any())]
        for j in range(len(phrases))
    ]
    tokenizer = word_tokenizer([text for own in captions for texts in own for text in texts])
    tokenizer.save_pretrained(folder)
    text_cfg = TEXT | {"vocab_size": len(tokenizer), "hf_tokenizer_name": "word-level"}
    model_cfg = {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": text_cfg}
    model = open_clip.CLIP(**model_cfg, init_logit_scale=math.log(60), init_logit_bias=-8.0)
    _spread_texts(model, tokenizer.eos_token_id)
    model.to(DEVICE)
    clip = Clip(model, partial(_tokenize, tokenizer), VISION["image_size"], HALVES, HALVES)
    words = torch.nn.Linear(EMBED_DIM, len(phrases)).to(DEVICE)

    def batch() -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Pictures, one caption of each, and which phrases are said of each, (N, phrases)."""
        picked = [pick(part, BATCH_SIZE // len(drawn), rng) for part in drawn]
        chosen = [
            of[i][rng.integers(N_CAPTIONS)]
            for of, (_, places) in zip(captions, picked, strict=True)
            for i in places
        ]
        said = [rows[places] for rows, (_, places) in zip(says, picked, strict=True)]
        said = torch.from_numpy(np.concatenate(said)).float().to(DEVICE)
        return torch.cat([pictures for pictures, _ in picked]), chosen, said

    def classification() -> torch.Tensor:
        pictures, _, said = batch()
        logits = words(embed_images(clip, pictures) * EMBED_DIM**0.5)
        return F.binary_cross_entropy_with_logits(logits.float(), said)

    def contrast() -> torch.Tensor:
        pictures, chosen, said = batch()
        openings = [("", f"{who}, ", f"{who} with ")[rng.integers(3)] for who in subjects]
        spoken = [opening + phrase for opening, phrase in zip(openings, phrases, strict=True)]
        return _contrast(clip, pictures, chosen + spoken, said)

    eye = torch.nn.ModuleList([model.visual, words])
    fit(eye, classification, n_steps // 2, 2e-3, "CLIP's eye")
    fit(model, contrast, n_steps // 2, 2e-3, "CLIP")
    _save_clip(model, model_cfg, folder)


def _several_captions(drawn: list[Drawn], rng: np.random.Generator) -> list[list[tuple[str]]]:
    """Of each picture, because each caption leaves some of the truth unsaid: (domain, N)."""
    several = []
    for part in drawn:
        tell = DOMAINS[part.domain].captions
        told = [tell(part.factors, rng) for _ in range(N_CAPTIONS)]
        several.append(list(zip(*told, strict=True)))
    return several


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    length = {"padding": "max_length", "truncation": True, "max_length": CONTEXT_LENGTH}
    return tokenizer(texts, return_tensors="pt", **length).input_ids


def _contrast(
    clip: Clip, pictures: torch.Tensor, texts: list[str], said: torch.Tensor
) -> torch.Tensor:
    """Both losses of pictures (N, 3, H, W) and texts: first a caption of each picture, then the
    phrases, of which `said` (N, phrases) tells whose they are."""
    image = embed_images(clip, pictures).float()
    text = embed_texts(clip, texts).float()
    similarity = clip.model.logit_scale.exp().clamp(max=100) * image @ text.T
    matches, yes_or_no = similarity.split([len(image), said.shape[1]], dim=1)
    own = torch.arange(len(image), device=DEVICE)
    softmax = (F.cross_entropy(matches, own) + F.cross_entropy(matches.T, own)) / 2
    sigmoid = F.binary_cross_entropy_with_logits(yes_or_no + clip.model.logit_bias, said)
    return softmax + 10 * sigmoid


def _save_clip(model: open_clip.CLIP, model_cfg: dict, folder: Path) -> None:
    side = {"size": VISION["image_size"], "interpolation": "bicubic"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": HALVES, "std": HALVES} | side}
    text = json.dumps(config, indent=2) + "\n"
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    del state["logit_bias"]  # serves the sigmoid loss only
    save_file(state, folder / "open_clip_model.safetensors")


def _phrases(captions: list[list[tuple[str]]]) -> tuple[list[str], list[np.ndarray]]:
    """The phrases that captions are made of, and whose say which: bool (N, phrases) per domain."""
    parts = [
        [set(PHRASE_END.split(", ".join(texts))) for texts in pictures] for pictures in captions
    ]
    counts = Counter(phrase for texts in parts for own in texts for phrase in own)
    phrases = [phrase for phrase, count in sorted(counts.items()) if count >= RARE]
    says = [np.array([[p in own for p in phrases] for own in texts]) for texts in parts]
    return phrases, says


def _spread_texts(model: open_clip.CLIP, end: int) -> None:
    """Begin with texts far apart, as bags of words."""
    width = model.transformer.width
    torch.nn.init.normal_(model.token_embedding.weight, std=0.5)
    torch.nn.init.zeros_(model.token_embedding.weight[end])
    for block in model.transformer.resblocks:
        torch.nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5)


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
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
    words = {
        word
        for text in set(texts) | set(prompts)
        for word in normalizer.normalize_str(text).split()
    }
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
        image_size=SIZE, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=3,
        intermediate_size=384, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=labels, label2id={label: i for i, label in labels.items()},
    )  # fmt: skip
    model = ViTForImageClassification(config).to(DEVICE)

    def loss() -> torch.Tensor:
        pictures, places = pick(drawn, BATCH_SIZE, rng)
        return F.cross_entropy(model(pixel_values=pictures).logits.float(), classes[places])

    fit(model, loss, n_steps, 1e-3, "age")
    model.cpu().save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    ViTImageProcessor(size=size, image_mean=HALVES, image_std=HALVES).save_pretrained(folder)
