"""Prompts of a text-to-image policy: a list, a file of lines, or a template with slots."""

import itertools
import string
from collections.abc import Sequence
from pathlib import Path

import torch

from ddpo_lib.settings import check_text


def load(source: str | Path | Sequence[str], **slots: Sequence[str]) -> list[str]:
    """The prompts that a source names, each once.

    Args:
        source: a list of texts; a file with one in each line, of which empty ones are left out; or
            a template such as "a(n) {animal} {activity}", in which "a(n)" becomes "a" or "an".
        slots: of a template the words for each slot; every combination is a prompt.

    ValueError for a slot without words, words without a slot, an empty prompt, or one that comes
    twice; FileNotFoundError for a missing file.
    """
    if not isinstance(source, str | Path):
        return _checked(list(source))
    names = [name for _, name, _, _ in string.Formatter().parse(str(source)) if name is not None]
    if not names and not slots:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        return _checked([line.strip() for line in lines if line.strip()])
    if set(names) != set(slots):
        said = f"the template {source!r} has the slots {sorted(set(names))}"
        raise ValueError(f"{said}, and there are words for {sorted(slots)}")
    combinations = itertools.product(*slots.values())
    filled = (dict(zip(slots, words, strict=True)) for words in combinations)
    return _checked([_article(str(source).format(**words)) for words in filled])


def cycle(prompts: Sequence[str], n: int) -> list[str] | None:
    """The prompts of n images of a set, one after the other; None where there are none."""
    return [prompts[i % len(prompts)] for i in range(n)] if prompts else None


def turns(n_prompts: int, size: int, n_samples: int, seed: int) -> torch.Tensor:
    """Which prompt each of n_samples has, (n_samples,) int64, in runs of `size`: all prompts take
    turns, each round in another order, which the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-n_samples // size // n_prompts)
    orders = [torch.randperm(n_prompts, generator=generator) for _ in range(rounds)]
    return torch.cat(orders).repeat_interleave(size)[:n_samples]


def _article(text: str) -> str:
    """Each "a(n)" before a word as it is written: by the word's first letter."""
    head, *rest = text.split("a(n) ")
    return head + "".join(f"a{'n' * (part[:1].lower() in 'aeiou')} {part}" for part in rest)


def _checked(prompts: list[str]) -> list[str]:
    for i, prompt in enumerate(prompts):
        check_text(f"prompt {i}, {prompt!r}", prompt)
        if prompt in prompts[:i]:
            raise ValueError(f"prompt {prompt!r} comes twice")
    if not prompts:
        raise ValueError("no prompts: give at least one")
    return prompts
