"""The model card of a finetuned policy, and its upload to the Hugging Face Hub."""

import json
from pathlib import Path

from ddpo_lib import hub, rewards, runs
from ddpo_lib.book import paths

LICENCES = {"google/ddpm-": "apache-2.0", "data/toy/": "mit"}
"""How a base's source begins → its licence, which is that of what is made from it."""


def save(home: Path) -> None:
    """Write best/README.md: config/model_card.md, filled with what the run's folder holds; with the
    evaluation set's metrics once evaluation.json is there."""
    run, settings = _read(home / "profile.json"), _read(home / "settings.json")["settings"]
    n, best, done = settings["n_development"], runs.best_iteration(home), runs.iterations_done(home)
    rows = runs.metrics(home)
    development = [(rows[i]["development_reward"], rows[i]["development_sd"]) for i in (0, best)]
    metrics = {f"development set, {n}": [(mean, sd / n**0.5) for mean, sd in development]}
    result = _read(home / "evaluation.json") if (home / "evaluation.json").exists() else {}
    if result.get("iterations") == done:  # the run has not gone on since
        means = [(result[f"{which}_mean"], result[f"{which}_se"]) for which in ("before", "reward")]
        metrics[f"evaluation set, {result['n']}"] = means
    repository, _, commit = run["models"]["policy"].rpartition("@")
    base = repository or run["base"]
    licence = next((name for start, name in LICENCES.items() if base.startswith(start)), None)
    stated = {"license": licence, "base_model": repository}
    known = run["reward"] in rewards.REWARDS
    template = (paths.CONFIG / "model_card.md").read_text(encoding="utf-8")
    card = template.format(
        run=run,
        metadata="".join(f"{key}: {value}\n" for key, value in stated.items() if value),
        base=base,
        commit=f", commit `{commit}`" if repository else "",
        meaning=f". {getattr(rewards, run['reward']).__doc__.splitlines()[0]}" if known else "",
        licence=f"{licence}, the base's" if licence else "the base's; see there",
        n_steps=settings["n_steps"],
        metrics=_table(
            (name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in means))
            for name, means in metrics.items()
        ),
        best=best,
        done=done,
        settings=_table({"seed": run["seed"], **settings, **run["objective_settings"]}.items()),
    )
    (home / "best" / "README.md").write_text(card, encoding="utf-8")


def push_to_hub(home: Path, repository: str, private: bool = False) -> str:
    """Upload best/ of the run in `home`, with its card, and return the commit's address.

    The repository, "me/my-model", is made, private or not, if it is not there. FileNotFoundError
    where there is no best/ yet, or the Hub does not take it; says what to do.
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
