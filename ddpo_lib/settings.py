"""Hyperparameters as frozen dataclasses whose fields have ranges."""

import dataclasses
import math
from dataclasses import dataclass
from typing import get_type_hints


def number(default, low=-math.inf, high=math.inf, *, above=-math.inf, below=math.inf):
    """A field for a number: low <= value <= high and above < value < below."""
    return dataclasses.field(default=default, metadata={"bounds": (low, high, above, below)})


def choice(default, *others):
    """A field for one of a few values."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


def check(settings) -> None:
    """Check type and range of every field of a settings dataclass; its `__post_init__` calls this.
    ValueError for one that does not fit; names its range."""
    kinds = get_type_hints(type(settings))
    for entry in dataclasses.fields(settings):
        value, kind = getattr(settings, entry.name), kinds[entry.name]
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        needed, choices = None, entry.metadata.get("choices")
        if not fits or (isinstance(value, bool) and kind is not bool):
            needed = f"of type {kind.__name__} (in YAML 3e-5 needs its dot: 3.0e-5)"
        elif choices and value not in choices:
            needed = f"one of {choices}"
        elif "bounds" in entry.metadata:
            low, high, above, below = entry.metadata["bounds"]
            if not (low <= value <= high and above < value < below):  # NaN and infinities are not
                limits = {">=": low, ">": above, "<=": high, "<": below}.items()
                words = [f"{sign} {limit}" for sign, limit in limits if math.isfinite(limit)]
                needed = " and ".join([*words, "finite"])
        if needed:
            raise ValueError(f"{entry.name}={value!r}: must be {needed}")


def check_whole(name: str, value, low: int) -> None:
    """ValueError unless the value of an argument is a whole number from `low` up."""
    if type(value) is not int or value < low:
        raise ValueError(f"{name}={value!r}: must be a whole number from {low} up")


def check_text(title: str, value) -> None:
    """ValueError, with the title of what it is, unless a value is a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{title}: must be a text that is not empty")


SPEED_ONLY = ("micro_batch", "gradient_checkpointing")
"""Settings of `Finetune` that change memory and speed, and results by no more than rounding."""


@dataclass(frozen=True)
class Finetune:
    """Hyperparameters of the loop, not of the objective; the defaults are Table A.2's."""

    n_iterations: int = number(72, 1)
    """Rounds of rollout, reward and update."""
    n_samples: int = number(100, 2)
    """Trajectories per iteration."""
    n_steps: int = number(40, 2)
    """Denoising steps T of a trajectory; the last one is no action."""
    eta: float = number(1.0, high=1, above=0)
    """DDIM's eta while training: at 0 there is no exploration, above 1 no such Gaussian."""
    min_std: float = number(0.0, 0, below=1)
    """Steps with sigma_t up to this are not learned from; at 0, deterministic ones. A step's score
    grows with 1 / sigma_t: the last stochastic one can drown all others, see docs/fidelity.md."""
    minibatch_size: int = number(10, 1)
    """Trajectories per optimizer step."""
    n_inner_epochs: int = number(1, 1)
    """Passes over an iteration's trajectories."""
    micro_batch: int = number(200, 1)
    """Decisions per forward and backward, and images per call in a rollout. A GPU may round by the
    batch's size: where this divides both evenly, rollout and first update agree best."""
    timestep_fraction: float = number(1.0, high=1, above=0)
    """Share of the stochastic steps that an optimizer step learns from, drawn anew for each; the
    gradient stays the same on average."""
    gradient_checkpointing: bool = False
    """Less memory, more time: the backward pass repeats parts of the forward pass."""
    log_prob_reduction: str = choice("mean", "sum")
    """Over pixels: "mean" as published, or "sum", a true log-density; clip ranges go with it."""
    prompts: tuple = ()
    """Texts that a text-to-image policy is finetuned on, see `prompts.load`; () for one that takes
    none."""
    unseen_prompts: tuple = ()
    """Texts that it is never finetuned on, for whoever evaluates; none of them is in `prompts`."""
    samples_per_prompt: int = number(2, 2)
    """Consecutive samples of an iteration that share their prompt; rewards are compared among the
    samples of a prompt."""
    adapter_rank: int = number(0, 0)
    """Of a LoRA adapter on the attention projections of a text-to-image policy, which learns in the
    place of the weights, see `adapter`; 0 to learn all weights."""
    adapter_alpha: float = number(4.0, above=0)
    """The adapter's change counts alpha / rank times."""
    learning_rate: float = number(9e-8, 0, 1)
    """AdamW's rate; with "warmup_cosine", where the warm-up starts."""
    lr_schedule: str = choice("constant", "warmup_cosine")
    """"constant", or "warmup_cosine", see the function `learning_rate`."""
    peak_learning_rate: float = number(3.7e-6, high=1, above=0)
    """Top of "warmup_cosine". Table A.2's own, 3.75e-6, is in thesis.yaml; see docs/fidelity.md."""
    warmup: float = number(0.25, 0, 1)
    """Fraction of all updates spent warming up."""
    final_lr_fraction: float = number(0.1, 0, 1)
    """The cosine ends at this fraction of `learning_rate`."""
    weight_decay: float = number(1e-4, 0, 1)
    """AdamW's."""
    max_grad_norm: float = number(1.0, above=0)
    """The gradient is rescaled to at most this norm."""
    n_development: int = number(64, 2)
    """Images of the development set, drawn from fixed noise after every iteration: at eta = 0, and
    from the same initial noise by the training sampler."""
    select_by: str = choice("development", "stochastic", "latest")
    """best/ has the highest mean reward of the development set: as "development", at eta = 0, the
    sampler that model cards name and whose noise does not blur the choice; as "stochastic", by the
    training sampler. Or it is the "latest", where a reward is no reason to choose."""
    bf16: bool = True
    """Run the network under bfloat16 autocast, on a GPU only if it has bfloat16."""

    def __post_init__(self):
        for name in ("prompts", "unseen_prompts"):
            texts = getattr(self, name)
            object.__setattr__(self, name, tuple(texts) if isinstance(texts, list) else texts)
        check(self)
        self._check_prompts()
        if self.n_samples % self.minibatch_size:
            size = f"minibatch_size={self.minibatch_size}"
            raise ValueError(f"n_samples={self.n_samples} is not a multiple of {size}")
        if self.lr_schedule == "constant" and self.learning_rate == 0:
            raise ValueError("learning_rate=0 at a constant rate: nothing would be learned")

    def _check_prompts(self) -> None:
        seen = set()
        for text in (*self.prompts, *self.unseen_prompts):
            check_text(f"prompt {text!r}", text)
            if text in seen:
                raise ValueError(f"prompt {text!r} stands twice in prompts and unseen_prompts")
            seen.add(text)
        if self.unseen_prompts and not self.prompts:
            raise ValueError(f"unseen_prompts={self.unseen_prompts}: prompts are missing")
        if self.prompts and self.n_samples % self.samples_per_prompt:
            per = f"samples_per_prompt={self.samples_per_prompt}"
            raise ValueError(f"n_samples={self.n_samples} is not a multiple of {per}")

    @property
    def n_updates(self) -> int:
        """Optimizer steps of a run whose objective takes every trajectory once an epoch."""
        return self.n_iterations * self.n_inner_epochs * (self.n_samples // self.minibatch_size)

    @property
    def decisive(self) -> dict:
        """The settings that decide what a run does: without those of memory and speed, and at a
        constant rate without `n_iterations`, for a longer run goes on from a shorter one."""
        left_out = set(SPEED_ONLY)
        if self.lr_schedule == "constant":
            left_out |= {"n_iterations", "peak_learning_rate", "warmup", "final_lr_fraction"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}


def learning_rate(progress: float, settings: Finetune) -> float:
    """The rate of an optimizer step (Fig. 5.7): constant, or a linear warm-up from `learning_rate`
    to `peak_learning_rate` over the first `warmup` of all updates, then half a cosine down to
    `final_lr_fraction` × `learning_rate`. `progress` is 0 at the first update, 1 at the last."""
    start = settings.learning_rate
    if settings.lr_schedule == "constant":
        return start
    peak, end = settings.peak_learning_rate, settings.final_lr_fraction * start
    if progress < settings.warmup:
        return start + (peak - start) * progress / settings.warmup
    after = (progress - settings.warmup) / max(1e-9, 1 - settings.warmup)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
