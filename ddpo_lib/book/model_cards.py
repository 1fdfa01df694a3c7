"""The model card of a finetuned policy, and its upload to the Hugging Face Hub."""

import json
from pathlib import Path

from ddpo_lib import hub, rewards, runs
from ddpo_lib.book import paths

LICENCES = {"google/ddpm-": "apache-2.0", "data/toy/": "mit"}
"""How a base's source begins → its licence, which is that of what is made from it."""


def save(home: Path) -> None:
    """Write best/README.md: config/model_card.md, filled with what the run's folder holds.

    The evaluation set's metrics are in it once evaluation.json is there.
    """
    run, settings = _read(home / "profile.json"), _read(home / "settings.json")["settings"]
    n, best, done = settings["n_development"], runs.best_iteration(home), runs.iterations_done(home)
    means = {
        row["iteration"]: f"{row['development_reward']:.3f} ± {row['development_sd'] / n**0.5:.3f}"
        for row in runs.metrics(home)
    }
    metrics = [(f"development set, {n}", means[0], means[best])]
    result = _read(home / "evaluation.json") if (home / "evaluation.json").exists() else {}
    if result.get("iterations") == done:  # the run has not gone on since
        before, after = (f"{result[f'{which}_mean']:.3f} ± {result[f'{which}_se']:.3f}"
                         for which in ("before", "reward"))  # fmt: skip
        metrics.append((f"evaluation set, {result['n']}", before, after))
    repository, _, commit = run["models"]["policy"].rpartition("@")
    base = repository or run["base"]
    licence = next((name for start, name in LICENCES.items() if base.startswith(start)), None)
    stated = {"license": licence, "base_model": repository}
    known = run["reward"] in rewards.REWARDS
    template = (paths.CONFIG / "model_card.md").read_text(encoding="utf-8")
    card = template.format(
        metadata="".join(f"{key}: {value}\n" for key, value in stated.items() if value),
        task=run["task"],
        objective=run["objective"],
        base=base,
        commit=f", commit `{commit}`" if repository else "",
        reward=run["reward"],
        meaning=f". {getattr(rewards, run['reward']).__doc__.splitlines()[0]}" if known else "",
        licence=f"{licence}, the base's" if licence else "the base's; see there",
        metrics=_table(metrics),
        best=best,
        settings=_table({"seed": run["seed"], **settings, **run["objective_settings"]}.items()),
        n_steps=settings["n_steps"],
        n_iterations=done,
    )
    (home / "best" / "README.md").write_text(card, encoding="utf-8")


def push_to_hub(home: Path, repository: str, private: bool = False) -> str:
    """Upload a run's best/, with a card that has its latest metrics. Nothing calls this by itself.

    Args:
        home: the run's folder.
        repository: its id on the Hub, "me/my-model"; if it is not there it is made, private or not.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: the run has no best/ yet, or the Hub does not take it; says what to do.
    """
    from huggingface_hub import HfApi

    best, api = home / "best", HfApi()
    if not (best / "model_index.json").is_file():
        raise FileNotFoundError(f"{best} holds no policy: finetune first")
    save(home)
    message = f"{home.name}, finetuned with reinforcement learning"
    with hub.explained(repository, "send to"):
        api.create_repo(repository, private=private, exist_ok=True)
        sent = api.upload_folder(repo_id=repository, folder_path=best, commit_message=message)
    return sent.commit_url


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def _table(rows) -> str:
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
