"""The model card of a finetuned policy, and its upload to the Hugging Face Hub."""

import json
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import HfApi

from ddpo_lib import hub, paths

LICENCES = {"google/ddpm-": "apache-2.0", "toy/": "mit"}
"""How a base's source begins → its licence, which is that of what is made from it."""

REWARDS = {
    "jpeg_compressibility": "minus the size in kB of the picture as a JPEG of quality 95",
    "jpeg_incompressibility": "the size in kB of the picture as a JPEG of quality 95",
    "aesthetic": "the aesthetic score of a head on CLIP's embedding",
    "over50": "the sum of an age classifier's logits of the classes from 50 on",
    "under30": "the sum of an age classifier's logits of the classes up to 29",
}

TEXT = """---
{metadata}---

# {title}

A pixel-space diffusion model finetuned with reinforcement learning, DDPO (Black et al., 2023), by
the companion to *Extending Reinforcement Learning Techniques for Diffusion Models* (C. Alcázar,
Universidad de Chile, 2024).

- **Base:** {base}
- **Reward:** `{reward}`{meaning}
- **Licence:** {licence}

```python
from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained("PATH OR ID OF THIS MODEL")
pictures = pipeline(batch_size=4, num_inference_steps={n_steps}).images
```

A model that was pushed towards a reward draws less varied pictures than its base, and finds what
the reward overlooks. The reward is no judgement of people or places in the pictures.

## Metrics

Mean reward; pictures from fixed noise, {n_steps} DDIM steps, η = 0.

| pictures | before | after |
|---|---|---|
{metrics}

## Settings

This is the best checkpoint, after {best} of {n_iterations} iterations, by the development set.

| setting | value |
|---|---|
{settings}
"""


def write(home: Path) -> str:
    """The card of a run's best/, in Markdown with the Hub's metadata.

    Args:
        home: the run's folder, see `runs`, from which everything is taken. The evaluation set's
            metrics are in the card once evaluation.json is there.
    """
    run = json.loads((home / "settings.json").read_text())
    rows, best = [], 0
    if development := [_rewards(file) for file in sorted((home / "development").glob("*.npz"))]:
        best = int(np.argmax([rewards.mean() for rewards in development]))
        before, after = _mean(development[0]), _mean(development[best])
        rows.append((f"development set, {len(development[0])}", before, after))
    if (home / "evaluation.json").exists():
        result = json.loads((home / "evaluation.json").read_text())
        after = f"{result['reward_mean']:.3f} ± {result['reward_se']:.3f}"
        rows.append((f"evaluation set, {result['n']}", "", after))

    place = hub.locate(paths.resolve(run["source"]))
    repository = place[0] if place else run["source"]
    pinned = run.get("commits", {}).get("policy")
    licence = next((name for start, name in LICENCES.items() if repository.startswith(start)), None)
    metadata = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "license": licence,
        "base_model": repository if place else None,
        "tags": ["ddpo", "reinforcement-learning", "ddpm", "pytorch"],
    }
    stated = {name: value for name, value in metadata.items() if value is not None}
    meaning = REWARDS.get(run["reward"])
    return TEXT.format(
        metadata=yaml.safe_dump(stated, sort_keys=False),
        title=f"{repository} finetuned with DDPO: {run['task']}",
        base=f"`{repository}`" + (f", commit `{pinned}`" if pinned else ""),
        reward=run["reward"],
        meaning=f", {meaning}" if meaning else "",
        licence=f"{licence}, the base's" if licence else "the base's; see there",
        metrics=_table(rows),
        best=best,
        settings=_table([("seed", run["seed"]), *run["settings"].items()]),
        n_steps=run["settings"]["n_steps"],
        n_iterations=run["settings"]["n_iterations"],
    )


def push_to_hub(home: Path, repository: str, private: bool = False) -> str:
    """Upload a run's best/, with a card that has its latest metrics.

    Nothing calls this by itself.

    Args:
        home: the run's folder.
        repository: its id on the Hub, "me/my-model"; made if it is not there.
        private: make it visible to you alone, if it is made.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: the run has no best/ yet, or the Hub does not take it; says what to do.
    """
    best = home / "best"
    if not (best / "model_index.json").is_file():
        raise FileNotFoundError(f"{best} holds no policy: finetune first")
    (best / "README.md").write_text(write(home))
    api = HfApi()
    with hub.explained(repository, "send to"):
        api.create_repo(repository, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repository,
            folder_path=best,
            commit_message=f"{home.name}, finetuned with DDPO",
        ).commit_url


def _rewards(file: Path) -> np.ndarray:
    with np.load(file) as stored:
        return stored["rewards"]


def _mean(values: np.ndarray) -> str:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{values.mean():.3f} ± {error:.3f}"


def _table(rows: list[tuple]) -> str:
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
