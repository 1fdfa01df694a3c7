"""Rewards that read the prompt: functions of (images, prompts), see `rewards`."""

import base64
import importlib
import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from ddpo_lib import encoders, hub
from ddpo_lib.rewards import Reward, check_images, to_uint8

QUESTION = (
    "How well does this image show “{prompt}”? Answer with one number from 0, not at all, to 10, "
    "entirely, and nothing else."
)
N_TRIES = 3


def clip_alignment(clip: encoders.Clip) -> Reward:
    """The cosine between CLIP's embeddings of image and prompt, in [-1, 1]."""

    def clip_alignment(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        check_images(images)
        texts = encoders.embed_texts(clip, list(prompts))
        return (encoders.embed_images(clip, images) * texts.to(images.device)).sum(1)

    return clip_alignment


def pick_score(source: str, device: str | None = None) -> Reward:
    """PickScore (Kirstain et al., 2023), of "yuvalkirstain/PickScore_v1" or a folder in its format:
    a CLIP that was finetuned on people's choices, its cosine times its logit scale, about 15…25.
    FileNotFoundError where the model cannot be had."""
    from transformers import AutoModel, AutoProcessor

    with hub.explained(source):
        model = AutoModel.from_pretrained(source).eval().requires_grad_(False)
        processor = AutoProcessor.from_pretrained(source)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def pick_score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        options = {"return_tensors": "pt", "padding": True, "truncation": True}
        seen = processor(images=_pictures(images), text=list(prompts), **options).to(model.device)
        return model(**seen).logits_per_image.diagonal()

    return pick_score


def image_reward() -> Reward:
    """ImageReward (Xu et al., 2023), by its package: `pip install image-reward`."""
    model = _package("ImageReward", "image-reward").load("ImageReward-v1.0")

    def image_reward(images: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        pairs = zip(prompts, _pictures(images), strict=True)
        return [model.score(prompt, picture) for prompt, picture in pairs]

    return image_reward


def human_preference() -> Reward:
    """HPS v2.1 (Wu et al., 2023), by its package: `pip install hpsv2`."""
    package = _package("hpsv2", "hpsv2")

    def human_preference(images: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        pairs = zip(_pictures(images), prompts, strict=True)
        return [float(package.score(*pair, hps_version="v2.1")[0]) for pair in pairs]

    return human_preference


def ask(
    address: str,
    model: str,
    question: str = QUESTION,
    key: str | None = None,
    timeout: float = 60,
    n_parallel: int = 8,
) -> Reward:
    """A vision-language model behind an OpenAI-compatible address is shown each image and asked.

    Args:
        address: of the server, "http://localhost:8000/v1".
        model: the name by which the server knows the model.
        question: with {prompt}; the first number in the answer is the reward.
        key: sent as a bearer token.
        timeout: seconds that an answer may take; it is asked `N_TRIES` times.
        n_parallel: images that are shown at once.

    The reward raises ConnectionError where the server gives no answer, ValueError where an answer
    has no number in it, such as a refusal.
    """
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}

    def answer(picture: Image.Image, prompt: str) -> float:
        file = io.BytesIO()
        picture.save(file, format="PNG")
        image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [
            {"type": "text", "text": question.format(prompt=prompt)},
            {"type": "image_url", "image_url": {"url": image}},
        ]
        asked = {"model": model, "temperature": 0, "max_tokens": 32}
        body = json.dumps(asked | {"messages": [{"role": "user", "content": content}]}).encode()
        request = urllib.request.Request(f"{address.rstrip('/')}/chat/completions", body, headers)
        said = _post(request, timeout)
        if not (number := re.search(r"-?\d+(\.\d+)?", said)):
            raise ValueError(f"{model} at {address} gave no number for {prompt!r}: {said[:200]!r}")
        return float(number[0])

    def ask(images: torch.Tensor, prompts: Sequence[str]) -> list[float]:
        with ThreadPoolExecutor(n_parallel) as pool:
            return list(pool.map(answer, _pictures(images), prompts))

    return ask


def _post(request: urllib.request.Request, timeout: float) -> str:
    """The text that the server answers; tried again where it is busy or silent."""
    for attempt in range(1, N_TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return json.load(reply)["choices"][0]["message"]["content"] or ""
        except (OSError, ValueError, LookupError, TypeError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if attempt == N_TRIES or (refused and error.code != 429):
                advice = "start the server, or raise the timeout; the run goes on from its last"
                said = f"no answer from {request.full_url} ({hub.cause(error)})"
                raise ConnectionError(f"{said}: {advice} iteration") from error
            time.sleep(attempt)


def _package(name: str, distribution: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        said = f"this reward needs the package {name}, which cannot be imported ({error})"
        raise ImportError(f"{said}: pip install {distribution}") from error


def _pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(levels) for levels in to_uint8(images).numpy()]
