"""Settings as frozen dataclasses, and the profiles in config/ that fill them."""

import dataclasses
from dataclasses import dataclass, field

import yaml

from ddpo_lib import paths

CHOICES = {
    "objective": ("ddpo_is", "ddpo_sf"),
    "log_prob_reduction": ("mean", "sum"),
    "loss_reduction": ("sum", "mean"),
    "advantage_scope": ("iteration", "minibatch"),
    "lr_schedule": ("constant", "warmup_cosine"),
    "jpeg_encoding": ("rescaled", "published"),
}


SPEED_ONLY = ("micro_batch", "gradient_checkpointing")
"""Settings of `Finetune` that change memory and speed, and results by no more than rounding."""


@dataclass(frozen=True)
class Finetune:
    """Hyperparameters of one finetuning; the defaults are the thesis's (Table A.2)."""

    n_iterations: int = 72
    """Rounds of rollout, reward and update."""
    n_samples: int = 100
    """Trajectories per iteration."""
    n_steps: int = 40
    """Denoising steps T of a trajectory."""
    eta: float = 1.0
    """DDIM's eta while training; must be above 0, or there is no exploration."""
    min_std: float = 0.0
    """Steps with sigma_t up to this are not learned from. At 0 only deterministic steps are left
    out. The score of a step grows with 1 / sigma_t, so the last stochastic one (sigma_t about 0.01)
    can drown all others in noise, see docs/fidelity.md."""
    minibatch_size: int = 10
    """Trajectories per optimizer step."""
    n_inner_epochs: int = 1
    """Passes over an iteration's trajectories."""
    micro_batch: int = 200
    """(sample, timestep) pairs per forward and backward, and pictures per call in a rollout. A GPU
    may round differently for batches of different sizes: where this divides both evenly, rollout
    and first update agree best."""
    timestep_fraction: float = 1.0
    """Share of the stochastic steps that an optimizer step learns from, drawn anew for each. Less
    takes less time, and the gradient stays the same on average."""
    gradient_checkpointing: bool = False
    """Keep less of the network's forward pass and compute it again for the backward pass: less
    memory, more time."""
    objective: str = "ddpo_is"
    """"ddpo_is" (clipped importance ratios, equation 4.4) or "ddpo_sf" (score function, 4.2)."""
    clip_range: float = 1e-4
    """Half-width of the ratio's trust interval; goes with `log_prob_reduction`."""
    log_prob_reduction: str = "mean"
    """Over pixels: "mean" as in the published code, or "sum", a true log-density."""
    loss_reduction: str = "sum"
    """Over timesteps: "sum" as in equation 4.4, or "mean"."""
    advantage_scope: str = "iteration"
    """Rewards are standardised over the whole "iteration" or each "minibatch"."""
    advantage_clip: float = 4.5
    """Standardised advantages are clamped to ± this."""
    learning_rate: float = 9e-8
    """AdamW's rate; with "warmup_cosine", where the warm-up starts."""
    lr_schedule: str = "constant"
    """"constant", or "warmup_cosine": linear warm-up to the peak, then half a cosine (Fig. 5.7)."""
    peak_learning_rate: float = 3.7e-6
    """Top of "warmup_cosine". Table A.2's own, 3.75e-6, is in thesis.yaml; see docs/fidelity.md."""
    warmup: float = 0.25
    """Fraction of all updates spent warming up."""
    final_lr_fraction: float = 0.1
    """The cosine ends at this fraction of `learning_rate`."""
    weight_decay: float = 1e-4
    """AdamW's."""
    max_grad_norm: float = 1.0
    """The gradient is rescaled to at most this norm."""
    n_development: int = 64
    """Pictures of the development set, drawn from fixed noise at eta = 0 after every iteration."""
    jpeg_encoding: str = "rescaled"
    """How the JPEG rewards see a picture, see `rewards.jpeg_kilobytes`."""
    bf16: bool = True
    """Run the network under bfloat16 autocast, on a GPU only if it has bfloat16."""

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, (int, float) if entry.type is float else entry.type):
                raise ValueError(
                    f"{entry.name}={value!r}: must be of type {entry.type.__name__} "
                    "(in YAML a number such as 3e-5 needs its dot: 3.0e-5)"
                )
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {allowed}")
        counts = ("n_iterations", "n_samples", "minibatch_size", "n_inner_epochs", "micro_batch")
        for name in (*counts, "n_development"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.eta <= 0:
            raise ValueError(f"eta={self.eta}: finetuning needs a stochastic sampler, eta > 0")
        one_update = self.minibatch_size == self.n_samples and self.n_inner_epochs == 1
        if self.objective == "ddpo_sf" and not one_update:
            raise ValueError(
                "objective='ddpo_sf' allows one update per rollout: set minibatch_size to "
                f"n_samples, {self.n_samples}, and n_inner_epochs to 1; or take 'ddpo_is'"
            )
        if self.n_samples % self.minibatch_size:
            raise ValueError(
                f"n_samples={self.n_samples} is not a multiple of "
                f"minibatch_size={self.minibatch_size}"
            )
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction={self.timestep_fraction}: must be in (0, 1]")
        if self.min_std < 0:
            raise ValueError(f"min_std={self.min_std}: must be at least 0")
        if self.n_steps < 2:
            raise ValueError(f"n_steps={self.n_steps}: must be at least 2, the last is no action")

    @property
    def n_updates(self) -> int:
        """Optimizer steps in the whole run."""
        return self.n_iterations * self.n_inner_epochs * (self.n_samples // self.minibatch_size)


@dataclass(frozen=True)
class Evaluation:
    """The fixed-noise evaluation set behind Table 5.1."""

    n: int = 1000
    """Pictures."""
    n_steps: int = 40
    """DDIM steps, at eta = 0."""
    seed: int = 2024
    """Of the initial noise, shared by the pretrained and every finetuned policy."""


@dataclass(frozen=True)
class Models:
    """Sources of the models behind the rewards: folders under data/, or the Hub's, see `hub`."""

    clip: str
    aesthetic: str
    age: str


REWARD_MODELS = {"aesthetic": ("clip", "aesthetic"), "over50": ("age",), "under30": ("age",)}
"""Reward → the fields of `Models` that it looks through; other rewards need none."""


@dataclass(frozen=True)
class Run:
    """Everything that decides what one finetuning does; its folder's name is `name`."""

    profile: str
    policy: str
    """Name of the policy in the profile."""
    source: str
    """Where its pretrained weights are."""
    task: str
    reward: str
    """A name in `rewards.REWARDS`, or "package.module:function"."""
    seed: int
    models: Models
    settings: Finetune

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.task}-s{self.seed}"

    @property
    def sources(self) -> dict[str, str]:
        """Every model whose weights decide what the run does, and where it is."""
        needed = REWARD_MODELS.get(self.reward, ())
        return {"policy": self.source} | {name: getattr(self.models, name) for name in needed}


@dataclass(frozen=True)
class Profile:
    """A world to run in: which models, which finetunings, how to evaluate."""

    name: str
    policies: dict[str, str]
    """Policy name → folder under data/ or Hub id, "google/ddpm-church-256@<revision>"."""
    models: Models
    evaluation: Evaluation
    tasks: dict[str, dict]
    """Task name → its reward and its changes to `finetune`, which may differ by policy."""
    finetune: dict
    """Changes to `Finetune`'s defaults for every task."""
    runs: list[dict] = field(default_factory=list)
    """The batch: one {policy, task, seed} for each finetuning."""
    finetuned: dict[str, dict[str, str]] = field(default_factory=dict)
    """Policy name → task → source of a policy that others finetuned so, to be looked at without a
    run of one's own: a folder under data/, a Hub id, or a .pth of the thesis's code."""

    def run(
        self, policy: str, task: str, reward: str | None = None, seed: int = 0, **changes
    ) -> Run:
        """The settings of one finetuning.

        Args:
            policy: a name in `policies`.
            task: a name in `tasks`; with a `reward` given, any name for a task of your own.
            reward: overrides the task's; see `rewards.load`.
            seed: of noise and mini-batches.
            changes: fields of `Finetune`; None leaves the profile's value.

        Raises:
            ValueError: an unknown policy, task or setting; the message names what is allowed.
        """
        if policy not in self.policies:
            raise ValueError(
                f"unknown policy {policy!r}: profile {self.name!r} has {sorted(self.policies)}"
            )
        if task not in self.tasks and reward is None:
            raise ValueError(
                f"unknown task {task!r}: profile {self.name!r} has {sorted(self.tasks)}; "
                "for a task of your own, name its reward too, as 'package.module:function'"
            )
        own = dict(self.tasks.get(task, {}))
        task_reward = own.pop("reward", None)
        reward = reward or task_reward
        if reward is None:
            raise ValueError(f"task {task!r} of profile {self.name!r} names no reward")
        for name in self.policies:
            special = own.pop(name, {})
            if name == policy:
                own.update(special)
        changes = {name: value for name, value in changes.items() if value is not None}
        settings = _build(Finetune, self.finetune | own | changes, f"finetuning {policy}-{task}")
        source = self.policies[policy]
        return Run(self.name, policy, source, task, reward, seed, self.models, settings)

    def batch(self) -> list[Run]:
        """Every finetuning of the profile's batch."""
        return [self.run(**spec) for spec in self.runs]

    @property
    def is_toy(self) -> bool:
        """Whether the pictures are the toy world's, whose factors are known."""
        sources = [run.source for run in self.batch()] or self.policies.values()
        return all(source.startswith("toy/") for source in sources)

    def published(self, run: Run) -> str | None:
        """Source of the policy that others finetuned as `run` would, None if there is none."""
        return self.finetuned.get(run.policy, {}).get(run.task)


def load(name: str) -> Profile:
    """Read and check config/<name>.yaml.

    Raises:
        ValueError: no such profile, or an unknown or missing key, named with what is allowed.
    """
    file = paths.CONFIG / f"{name}.yaml"
    if not file.is_file():
        names = sorted(f.stem for f in paths.CONFIG.glob("*.yaml"))
        raise ValueError(f"unknown profile {name!r}: {paths.CONFIG} has {names}")
    content = yaml.safe_load(file.read_text())
    profile = _build(
        Profile,
        {
            "name": name,
            **content,
            "models": _build(Models, content.get("models", {}), f"{file.name}: models"),
            "evaluation": _build(
                Evaluation, content.get("evaluation", {}), f"{file.name}: evaluation"
            ),
        },
        file.name,
    )
    for task in profile.tasks:
        for policy in profile.policies:
            profile.run(policy, task)
    for policy, tasks in profile.finetuned.items():
        for task in tasks:
            profile.run(policy, task)
    profile.batch()
    return profile


def replace(run: Run, **changes) -> Run:
    """`run` with some of its `Finetune` settings changed."""
    return dataclasses.replace(run, settings=dataclasses.replace(run.settings, **changes))


def differences(old: dict, new: dict) -> list[str]:
    """What makes two runs different, "name old → new" each; from the dicts that settings.json has.

    Settings that change memory and speed alone are left out. One that `old` lacks is younger than
    that run, which had what is now its default; one that `new` lacks is not compared.
    """
    defaults = dataclasses.asdict(Finetune())
    before, after = (defaults | content | content["settings"] for content in (old, new))
    names = [name for name in new | new["settings"] if name not in ("settings", *SPEED_ONLY)]
    changed = [name for name in names if before.get(name) != after[name]]
    return [f"{name} {before.get(name)} → {after[name]}" for name in changed]


def _build(kind, values: dict, where: str):
    """kind(**values), with an error that names the unknown or missing keys."""
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown setting {unknown}; known are {known}")
    needs = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if needs - set(values):
        raise ValueError(f"{where}: missing {sorted(needs - set(values))}")
    return kind(**values)
