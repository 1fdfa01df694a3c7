"""Profiles: the worlds in config/*.yaml, and the finetunings that they describe."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ddpo_lib import objectives, prompts, rewards
from ddpo_lib.book import paths
from ddpo_lib.settings import Finetune, check, check_whole, choice, number

MODELS = ("clip", "aesthetic", "age")


@dataclass(frozen=True)
class Evaluation:
    """The evaluation set: n pictures, by n_steps steps of DDIM at eta = 0, from noise that the
    pretrained and every finetuned policy share."""

    n: int = number(1000, 2)
    n_steps: int = number(40, 1)
    seed: int = number(2024, 0)

    __post_init__ = check


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides what one finetuning does."""

    profile: str
    policy: str
    source: str
    """Of the policy's weights; this and `models` as in `Profile`."""
    task: str
    reward: str | Callable
    """A name in `rewards`, "package.module:function", or a function."""
    seed: int = number(0, 0)
    models: dict = field(hash=False)
    settings: Finetune
    objective: str
    """A name in `objectives`, or "package.module"."""
    objective_settings: object
    """The objective's own `Settings`."""
    jpeg_encoding: str = choice(*rewards.ENCODINGS)
    """How the JPEG rewards see a picture, see `rewards.to_uint8`."""
    guidance: float = number(1.0, 1)
    """Of a text-to-image policy, see `policy.Policy`, while it samples and learns."""

    def __post_init__(self):
        named = isinstance(self.reward, str) and ":" in self.reward
        if not (named or callable(self.reward) or self.reward in rewards.REWARDS):
            known = f"{rewards.REWARDS}, or your own, a function or 'package.module:function'"
            raise ValueError(f"unknown reward {self.reward!r}: give one of {known}")
        check(self)

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.task}-s{self.seed}"


@dataclass(frozen=True)
class Profile:
    """A world to run in. A model's source is an absolute path or, on the Hub, as in `hub`."""

    name: str
    policies: dict[str, str]
    """Policy name → source."""
    models: dict[str, str]
    """Of the rewards, "clip", "aesthetic" and "age" → source."""
    evaluation: Evaluation
    tasks: dict[str, dict]
    """Task name → its reward and its changes to `finetune`, which may differ by policy."""
    finetune: dict
    """Changes to the defaults for every task."""
    runs: list[dict] = field(default_factory=list)
    """The batch: {policy, task, seed} of each finetuning, or seeds: how many of them, from 0 up.
    With seeds_only it is run for the tables over seeds alone."""
    finetuned: dict[str, dict[str, str]] = field(default_factory=dict)
    """Policy name → task → source of a policy that others finetuned so, to be looked at without a
    run of one's own; also a .pth of the thesis's code."""

    def run(
        self, policy: str, task: str, reward: str | Callable | None = None, seed: int = 0, **changes
    ) -> Run:
        """One finetuning, or a ValueError that says what is allowed.

        Policy and task are names in the profile; with a `reward`, as in `Run`, the task may be one
        of your own. Changes are fields of `Finetune` and of the objective's `Settings`, `objective`
        and `jpeg_encoding`; None leaves the profile's value.
        """
        _check_names([policy, task])
        if policy not in self.policies:
            raise ValueError(f"unknown policy {policy!r}: {self.name} has {sorted(self.policies)}")
        if task not in self.tasks and reward is None:
            known = f"{self.name} has {sorted(self.tasks)}; of your own, give the reward too"
            raise ValueError(f"unknown task {task!r}: {known}")
        try:
            own = _mapping(self.tasks.get(task), "the task")
            special = {name: _mapping(own.pop(name, None), name) for name in self.policies}[policy]
            task_reward = own.pop("reward", None)
            changes = {name: value for name, value in changes.items() if value is not None}
            return Run(
                profile=self.name, policy=policy, source=self.policies[policy], task=task,
                reward=task_reward if reward is None else reward, seed=seed, models=self.models,
                **_settings(self.finetune, own, special, changes),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"finetuning {policy}-{task}: {error}") from None

    def batch(self, every_seed: bool = False) -> list[Run]:
        """Every finetuning of the profile's batch; with several seeds the first alone, or all."""
        runs = []
        for spec in self.runs:
            if spec.get("seeds_only") and not every_seed:
                continue
            n = spec.get("seeds", 1) if every_seed else 1
            own = {name: spec[name] for name in spec if name not in ("seeds", "seeds_only")}
            first = own.pop("seed", 0)
            runs += [self.run(**own, seed=seed) for seed in (first, *range(1, n))]
        return runs

    @property
    def is_toy(self) -> bool:
        """Whether the pictures are the toy world's, whose factors are known."""
        sources = [run.source for run in self.batch()] or self.policies.values()
        return all(Path(source).is_relative_to(paths.TOY) for source in sources)

    def published(self, run: Run) -> str | None:
        """Source of the policy that others finetuned as `run` would, None if there is none."""
        return self.finetuned.get(run.policy, {}).get(run.task)


def load(name: str) -> Profile:
    """Read and check config/<name>.yaml; ValueErrors name the file and the key."""
    known = sorted(file.stem for file in paths.CONFIG.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"unknown profile {name!r}: {paths.CONFIG} has {known}")
    file = paths.CONFIG / f"{name}.yaml"
    try:
        return _profile(name, yaml.load(file.read_text(encoding="utf-8"), Loader))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file.name}: {error}") from None


class Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML silently takes the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _profile(name: str, content) -> Profile:
    parts, needed = _fields(Profile)[1:], ("policies", "models", "tasks")
    content = dict.fromkeys(parts) | _mapping(content, "the file", parts, needed)
    runs = content["runs"] or []
    if not isinstance(runs, list):
        raise ValueError(f"runs: must be a list, not {runs!r}")
    _check_names([name])
    _check_names(_mapping(content["policies"], "policies"), letters="._")  # see `Run.name`
    evaluation = _mapping(content["evaluation"], "evaluation", _fields(Evaluation))
    finetuned = _mapping(content["finetuned"], "finetuned")
    profile = Profile(
        name,
        policies=_sources(content["policies"], "policies"),
        models=_sources(content["models"], "models", MODELS, MODELS),
        evaluation=Evaluation(**evaluation),
        tasks=_mapping(content["tasks"], "tasks"),
        finetune=_mapping(content["finetune"], "finetune"),
        runs=[_batch_entry(run) for run in runs],
        finetuned={policy: _sources(tasks, policy) for policy, tasks in finetuned.items()},
    )
    pairs = [(policy, task) for policy in profile.policies for task in profile.tasks]
    pairs += [(policy, task) for policy, tasks in profile.finetuned.items() for task in tasks]
    for policy, task in pairs:  # raises where one is impossible
        profile.run(policy, task)
    names = [run.name for run in profile.batch(every_seed=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"runs: {twice} stand twice")
    return profile


def _batch_entry(run) -> dict:
    named = ("policy", "task")
    run = _mapping(run, "runs", (*named, "seed", "seeds", "seeds_only"), named)
    n = run.get("seeds", 1)
    if "seed" in run and "seeds" in run:
        raise ValueError(f"runs: {run} has a seed and a number of seeds: give one of them")
    check_whole("runs: seeds", n, 1)
    if not isinstance(run.get("seeds_only", False), bool):
        raise ValueError(f"runs: seeds_only={run['seeds_only']!r}: must be true or false")
    return run


def _settings(*layers: dict) -> dict:
    """What a `Run` has of settings, from flat layers of which the later win."""
    objective, values = "ddpo", {}
    for layer in layers:
        if layer.get("objective", objective) != objective:
            # Another objective starts from its own defaults.
            before = _fields(objectives.load(objective).Settings)
            values = {name: value for name, value in values.items() if name not in before}
            objective = layer["objective"]
        values |= layer
    if not isinstance(objective, str):
        raise ValueError(f"objective={objective!r}: must be a name")
    kind = objectives.load(objective).Settings
    loop, own = _fields(Finetune), _fields(kind)
    others = ("objective", "jpeg_encoding", "guidance")
    if both := sorted({*loop, *others}.intersection(own)):
        raise ValueError(f"{both}: settings of the loop, and of the objective {objective!r} too")
    _mapping(values, "settings", (*loop, *own, *others))
    for name in ("prompts", "unseen_prompts"):
        if isinstance(source := values.get(name), dict):
            slots = {slot: words for slot, words in source.items() if slot != "template"}
            values[name] = prompts.load(str(source.get("template")), **slots)
        elif isinstance(source, str):
            values[name] = prompts.load(paths.resolve(source))
    return {
        "settings": Finetune(**{name: values[name] for name in loop if name in values}),
        "objective": objective,
        "objective_settings": kind(**{name: values[name] for name in own if name in values}),
        "jpeg_encoding": values.get("jpeg_encoding", rewards.ENCODINGS[0]),
        "guidance": values.get("guidance", 1.0),
    }


def _fields(kind: type) -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(kind))


def _mapping(value, where: str, known=None, needed=()) -> dict:
    """A copy of a mapping, {} of None; ValueError for other keys than known, or without needed."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a mapping, not {value!r}")
    if known is not None and (unknown := sorted(map(str, value.keys() - set(known)))):
        raise ValueError(f"{where}: unknown {unknown}; known are {sorted(known)}")
    if missing := sorted(set(needed) - value.keys()):
        raise ValueError(f"{where}: missing {missing}")
    return dict(value)


def _sources(value, where: str, known=None, needed=()) -> dict[str, str]:
    values = _mapping(value, where, known, needed)
    if wrong := [key for key, each in values.items() if not (isinstance(each, str) and each)]:
        raise ValueError(f"{where}: {wrong} must be folders or ids, not {values[wrong[0]]!r}")
    return {name: paths.resolve(source) for name, source in values.items()}


def _check_names(names, letters: str = "._-") -> None:
    """They become those of folders."""
    for name in names:
        if not re.fullmatch(f"[a-zA-Z0-9_][a-zA-Z0-9{letters}]*", str(name)) or name != str(name):
            raise ValueError(f"the name {name!r}: must be of letters, digits and any of {letters}")
