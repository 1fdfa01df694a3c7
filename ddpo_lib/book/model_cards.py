"""The model card of a finetuned policy, and its upload to the Hugging Face Hub."""

import dataclasses
from pathlib import Path

from ddpo_lib import adapter, disk, hub, judges, rewards, runs
from ddpo_lib.book import paths
from ddpo_lib.settings import Finetune

LICENCES = {"google/ddpm-": "apache-2.0", "data/toy/": "mit"}
"""How a base's source begins → its licence, which is that of what is made from it."""

PIXELS = """from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained("PATH OR ID OF THIS MODEL")
images = pipeline(batch_size=4, num_inference_steps={n_steps}, eta=0.0).images"""
TEXT = """from diffusers import DDIMScheduler, StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{source}")
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config){adapter}
options = {{"num_inference_steps": {n_steps}, "guidance_scale": {guidance}, "eta": 0.0}}
images = pipeline({prompt!r}, num_images_per_prompt=4, **options).images"""


def save(home: Path) -> None:
    """Write best/README.md: config/model_card.md, filled with what the run's folder holds; with the
    evaluation set's metrics once evaluation.json is there."""
    run = disk.read_json(home / "profile.json")
    # A run that is older than a setting had what is now its default.
    settings = dataclasses.asdict(Finetune()) | disk.read_json(home / "settings.json")["settings"]
    n, done = settings["n_development"], runs.iterations_done(home)
    best = runs.best(home)["iteration"]
    rows = runs.metrics(home)
    etas = {"development": "0", "stochastic": f"{settings['eta']:g}"}
    metrics = {}
    for kind, eta in etas.items():
        moments = [(rows[i][f"{kind}_reward"], rows[i][f"{kind}_sd"]) for i in (0, best)]
        own = [f"{mean:.3f} ± {sd / n**0.5:.3f}" for mean, sd in moments]
        metrics[f"reward, development set, {n}, η = {eta}"] = own
    result = disk.read_json(home / "evaluation.json") if (home / "evaluation.json").exists() else {}
    if result.get("iterations") == done:  # the run has not gone on since
        for name, eta in zip(("eta0", "eta1"), etas.values(), strict=True):
            told, title = result[name], f"evaluation set, {result['n']}, η = {eta}"
            pairs = [(told[f"{k}_mean"], told[f"{k}_se"]) for k in ("before", "reward")]
            metrics[f"reward, {title}"] = [f"{mean:.3f} ± {error:.3f}" for mean, error in pairs]
            if told["vendi"] is not None:
                vendi = [told["before_vendi"], told["vendi"]]
                metrics[f"Vendi score, {title}"] = [f"{score:.2f}" for score in vendi]
    repository, _, commit = run["models"]["policy"].rpartition("@")
    base = repository or run["base"]
    if Path(base).is_absolute():  # this machine's folders are private
        base = Path(base).name
    licence = next((name for start, name in LICENCES.items() if base.startswith(start)), None)
    stated = {"license": licence, "base_model": repository}
    template = (paths.CONFIG / "model_card.md").read_text(encoding="utf-8")
    prompts, own_adapter = settings["prompts"], ""
    if settings["adapter_rank"]:
        own_adapter = '\npipeline.load_lora_weights("PATH OR ID OF THIS MODEL")'
    usage = TEXT.format(
        source=base if own_adapter else "PATH OR ID OF THIS MODEL", adapter=own_adapter,
        n_steps=settings["n_steps"], guidance=run["guidance"], prompt=prompts[0],
    ) if prompts else PIXELS.format(n_steps=settings["n_steps"])  # fmt: skip
    card = template.format(
        run=run,
        usage=usage,
        task="text-to-image" if prompts else "unconditional-image-generation",
        kind="text-to-image" if prompts else "pixel-space",
        metadata="".join(f"{key}: {value}\n" for key, value in stated.items() if value),
        base=base,
        commit=f", commit `{commit}`" if repository else "",
        meaning=meaning(run["reward"]),
        licence=f"{licence}, the base's" if licence else "the base's; see there",
        n_steps=settings["n_steps"],
        metrics=_table((name, *own) for name, own in metrics.items()),
        best=best,
        selected=settings["select_by"],
        done=done,
        settings=_table({"seed": run["seed"], **settings, **run["objective_settings"]}.items()),
    )
    with disk.replacing(home / "best" / "README.md") as draft:
        draft.write_text(card, encoding="utf-8")


def meaning(reward: str) -> str:
    """A sentence about a reward that has a name; nothing about one of somebody's own."""
    if reward not in rewards.REWARDS:
        return ""
    source = rewards if hasattr(rewards, reward) else judges
    return f". {getattr(source, reward).__doc__.splitlines()[0]}"


def push_to_hub(home: Path, repository: str, private: bool = False) -> str:
    """Upload best/ of the run in `home`, with its card, and return the commit's address.

    The repository, "me/my-model", is made, private or not, if it is not there. FileNotFoundError
    where there is no best/ yet, or the Hub does not take it; says what to do.
    """
    from huggingface_hub import HfApi

    best, api = home / "best", HfApi()
    if not any((best / file).is_file() for file in ("model_index.json", adapter.FILE)):
        raise FileNotFoundError(f"{best} holds no policy: finetune first")
    save(home)
    message = f"{home.name}, finetuned with reinforcement learning"
    with hub.explained(repository, "send to"):
        api.create_repo(repository, private=private, exist_ok=True)
        sent = api.upload_folder(repo_id=repository, folder_path=best, commit_message=message)
    return sent.commit_url


def _table(rows) -> str:
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
