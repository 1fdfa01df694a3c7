"""Fingerprints: everything that decides a result changes them, and nothing else does."""

import dataclasses
import functools
import importlib
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from transformers import AutoTokenizer

from ddpo_lib import encoders, identity, objectives, rewards
from ddpo_lib import policy as policies
from ddpo_lib.book import paths
from ddpo_lib.identity import fingerprint
from ddpo_lib.policy import Policy
from ddpo_lib.settings import Finetune


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(source, name="reward"): what a module with this source has under that name."""
    monkeypatch.syspath_prepend(tmp_path)
    count = iter(range(99))

    def make(source, name="reward", module=None):
        module = module or f"own_{next(count)}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        sys.modules.pop(module, None)
        importlib.invalidate_caches()
        return getattr(importlib.import_module(module), name)

    return make


# ------------------------------------------------------------------------------- policies


def with_schedule(policy, **changes):
    scheduler = DDPMScheduler.from_config(policy.scheduler.config, **changes)
    return dataclasses.replace(policy, scheduler=scheduler)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"clip_sample": False},
        {"clip_sample_range": 2.0},
        {"num_train_timesteps": 500},
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing"},
    ],
)
def test_schedule_counts(policy, changes):
    assert fingerprint(with_schedule(policy, **changes)) != fingerprint(policy)
    assert fingerprint(with_schedule(policy)) == fingerprint(policy)


def test_weights_and_the_networks_configuration_count(policy, new_policy):
    assert fingerprint(new_policy()) == fingerprint(policy)
    assert fingerprint(new_policy(seed=1)) != fingerprint(policy)
    before = fingerprint(policy)
    policy.unet.register_to_config(flip_sin_to_cos=False)
    changed = fingerprint(policy)
    assert changed != before
    policy.unet.conv_in.bias.data[0] += 1e-6
    assert fingerprint(policy) != changed


def test_where_a_policy_is_and_its_precision_do_not_count(policy, new_policy):
    assert fingerprint(new_policy(bf16=True)) == fingerprint(policy)
    before = fingerprint(policy)
    policy.unet.to(memory_format=torch.channels_last)
    assert not policy.unet.conv_in.weight.is_contiguous()
    policy.unet.requires_grad_(False).train()
    assert fingerprint(policy) == before


def test_folder_and_file_format_do_not_count(policy, tmp_path):
    policies.save(policy, tmp_path / "here")
    whole = tmp_path / "there" / "and" / "elsewhere"
    (tmp_path / "here").rename(whole.parent.mkdir(parents=True) or whole)
    loaded = policies.load(whole, "cpu")
    assert fingerprint(loaded) == fingerprint(policy)
    safe = whole / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(loaded.unet.state_dict(), safe.with_suffix(".bin"))
    safe.unlink()
    assert fingerprint(policies.load(whole, "cpu")) == fingerprint(policy)


# ------------------------------------------------------------------------------- own functions

REWARD = """
    import math
    import torch
    from torch.nn.functional import relu

    scale = 2.0
    weights = torch.ones(3)
    unrelated = 1

    def helper(values):
        return relu(values) * scale

    def reward(images, power=1):
        '''Brightness.'''
        inner = [helper(image).mean() for image in images]
        return torch.stack(inner) ** power * math.pi * weights.sum()
"""


@pytest.mark.parametrize(
    "old, new",
    [
        ("helper(image).mean()", "helper(image).amax()"),  # the function, in a comprehension
        ("relu(values) * scale", "relu(-values) * scale"),  # what it calls
        ("scale = 2.0", "scale = 2.5"),  # what that uses
        ("scale = 2.0", "scale = 2"),
        ("torch.ones(3)", "torch.tensor([1.0, 1.0, 0.0])"),
        ("torch.ones(3)", "torch.ones(3, dtype=torch.float64)"),
        ("power=1", "power=2"),
        ("import relu", "import gelu as relu"),  # another function of a package
        ("math.pi", "math.e"),
    ],
)
def test_edit_of_a_reward_or_of_what_it_uses_counts(own, old, new):
    assert old in REWARD
    assert fingerprint(own(REWARD.replace(old, new))) != fingerprint(own(REWARD))


@pytest.mark.parametrize(
    "old, new",
    [
        ("'''Brightness.'''", "'''The mean of the pixels.'''"),
        ("unrelated = 1", "unrelated = 2"),
        ("scale = 2.0", "# twice\n\n    scale   =   2.0  # as much"),
        ("def reward(images, power=1)", "def reward(\n        images, power=1)"),
        ("reward", "score"),
    ],
)
def test_what_decides_nothing_does_not_count(own, old, new):
    assert old in REWARD
    changed = own(REWARD.replace(old, new), "score" if old == "reward" else "reward")
    assert fingerprint(changed) == fingerprint(own(REWARD))


def test_helper_in_a_module_of_ones_own_counts(own):
    helper = "def score(images):\n    return images.{}((1, 2, 3))\n"
    ways = {
        "import helpers": "helpers.score(images)",
        "from helpers import score": "score(images)",
        "import helpers as h": "h.score(images)",
    }
    for line, call in ways.items():
        body = f"{line}\ndef reward(images):\n    return {call}\n"
        seen = set()
        for reduction in ("mean", "amax", "mean"):
            own(helper.format(reduction), "score", module="helpers")
            seen.add(fingerprint(own(body)))
        assert len(seen) == 2, line


def test_edit_on_the_disk_counts_once_it_is_imported(own, tmp_path):
    """What runs is what was imported, whatever the file says now."""
    reward = own("def reward(images):\n    return images.mean((1, 2, 3))\n", module="mine")
    before = fingerprint(reward)
    (tmp_path / "mine.py").write_text("def reward(images):\n    return images.amax((1, 2, 3))\n")
    assert fingerprint(reward) == before
    edited = own("def reward(images):\n    return images.amax((1, 2, 3))\n", module="mine")
    assert fingerprint(edited) != before


def test_closures_lambdas_and_partials_count():
    def scaled(factor, helper=abs):
        return lambda images: helper(factor * images)

    def plus(images, more):
        return images + more

    different = [
        scaled(1.0),
        scaled(2.0),
        scaled(1.0, round),
        scaled(torch.ones(2)),
        scaled(scaled(1.0)),
        scaled(scaled(2.0)),
        lambda images: images.mean(),
        lambda images: images.amax(),
        lambda images: -images.mean(),
        lambda *images: images,
        lambda images: images,
        plus,
        functools.partial(plus, more=1.0),
        functools.partial(plus, more=2.0),
        functools.cache(plus),
        functools.cache(scaled),
    ]
    assert len({fingerprint(each) for each in different}) == len(different)
    assert fingerprint(scaled(2.0)) == fingerprint(scaled(2.0))
    assert fingerprint(functools.partial(plus, more=2.0)) == fingerprint(different[-3])


def test_what_an_exception_covers_counts(own):
    wide = """
        def reward(images):
            try:
                values = images.mean((1, 2, 3))
                images.sqrt_()
            except TypeError:
                values = 0
            return values
    """
    narrow = """
        def reward(images):
            try:
                values = images.mean((1, 2, 3))
            except TypeError:
                values = 0
            else:
                images.sqrt_()
            return values
    """
    assert fingerprint(own(wide)) != fingerprint(own(narrow))


def test_where_a_function_lies_does_not_count(own):
    source = "def reward(images):\n    return (__file__, __name__, images)\n"
    assert fingerprint(own(source)) == fingerprint(own(source))


def test_function_in_a_packages_wrapper_counts_and_not_its_module(own):
    source = """
        import torch

        @torch.no_grad()
        def reward(images):
            return images.mean((1, 2, 3))
    """
    assert fingerprint(own(source)) == fingerprint(own(source))
    assert fingerprint(own(source)) != fingerprint(own(source.replace("mean", "amax")))
    assert fingerprint(own(source)) != fingerprint(own(source.replace("@torch.no_grad()", "")))


def test_functions_in_circles_end(own):
    source = """
        def even(n):
            return n == 0 or odd(n - 1)
        def odd(n):
            return n == {} and even(n - 1)
    """
    assert fingerprint(own(source.format(0), "even")) == fingerprint(own(source.format(0), "even"))
    assert fingerprint(own(source.format(0), "even")) != fingerprint(own(source.format(1), "even"))
    itself = []
    itself.append(itself)
    fingerprint(itself)


# ------------------------------------------------------------------------------- own objects

OBJECT = """
    import torch

    class Base:
        def total(self, images):
            return images.sum((1, 2, 3))

    class Reward(Base):
        factor = 1.0

        def __init__(self, offset):
            self.offset = offset

        def __call__(self, images):
            return self.total(images) * self.factor + self.offset + self.more(images) + self.zero

        @staticmethod
        def more(images):
            return images.amax((1, 2, 3))

        @property
        def zero(self):
            return 0

    reward = Reward(0.5)
"""


@pytest.mark.parametrize(
    "old, new",
    [
        ("* self.factor", "/ self.factor"),
        ("images.sum", "images.mean"),
        ("factor = 1.0", "factor = 2.0"),
        ("images.amax", "images.amin"),
        ("return 0", "return 1"),
        ("Reward(0.5)", "Reward(0.6)"),
    ],
)
def test_edit_of_a_callable_objects_class_or_state_counts(own, old, new):
    assert old in OBJECT
    assert fingerprint(own(OBJECT.replace(old, new))) != fingerprint(own(OBJECT))
    assert fingerprint(own(OBJECT)) == fingerprint(own(OBJECT))


def test_edit_of_a_dataclass_of_ones_own_counts(own):
    source = """
        from dataclasses import dataclass

        @dataclass
        class Reward:
            scale: float = 1.0

            def __call__(self, images):
                return images.mean((1, 2, 3)) * self.scale

        reward = Reward()
    """
    prints = {
        fingerprint(own(source.replace(*edit)))
        for edit in [("", ""), ("mean", "amax"), ("Reward()", "Reward(2.0)"), ("*", "/"), ("", "")]
    }
    assert len(prints) == 4


def test_state_that_getstate_leaves_out_does_not_count():
    class Counting:
        def __init__(self):
            self.calls, self.scale = 0, 1.0

        def __getstate__(self):
            return {"scale": self.scale}

    first, second = Counting(), Counting()
    second.calls = 9
    assert fingerprint(first) == fingerprint(second)
    second.scale = 2.0
    assert fingerprint(first) != fingerprint(second)


def test_network_of_ones_own(own):
    source = """
        import torch

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = torch.nn.Linear(4, 1)
                torch.nn.init.constant_(self.linear.weight, 0.5)
                torch.nn.init.constant_(self.linear.bias, 0.0)
                self.scale = 1.0

            def forward(self, images):
                return self.linear(images.flatten(1)[:, :4]).squeeze(1) * self.scale

        reward = torch.nn.Sequential(torch.nn.Identity(), Net())
    """
    before = fingerprint(own(source))
    assert fingerprint(own(source)) == before
    for old, new in [
        ("weight, 0.5", "weight, 0.6"),
        ("scale = 1.0", "scale = 2.0"),
        (":4]", "4:8]"),
    ]:
        assert old in source
        assert fingerprint(own(source.replace(old, new))) != before


def test_layers_without_weights_count():
    def net(activation, stride=1):
        return nn.Sequential(nn.Conv2d(3, 3, 1, stride, bias=False), activation)

    torch.manual_seed(0)
    weights = net(nn.ReLU()).state_dict()
    seen = set()
    for each in (net(nn.ReLU()), net(nn.GELU()), net(nn.GELU("tanh")), net(nn.ReLU(), 2)):
        each.load_state_dict(weights)
        seen.add(fingerprint(each))
    assert len(seen) == 4


def test_addresses_in_a_layers_description_do_not_count(monkeypatch):
    seen = []

    def extra_repr(self):
        seen.append(object())
        return f"function={seen[-1]}"

    monkeypatch.setattr(nn.Identity, "extra_repr", extra_repr)
    assert repr(nn.Identity()) != repr(nn.Identity())
    assert fingerprint(nn.Identity()) == fingerprint(nn.Identity())


# ------------------------------------------------------------------------------- values


@dataclass
class Record:
    a: float
    b: object = None
    note: str = field(default="", compare=False)


def test_values_that_differ():
    values = [
        0, 0.0, False, None, "0", b"0", (), {}, set(), 0j, ..., [0], [[0]], {"0": 0}, {0: "0"}, {0},
        torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int32), torch.zeros(0),
        torch.zeros(1, dtype=torch.bfloat16), torch.zeros(()), torch.arange(6)[::2],
        torch.arange(6)[::3], np.zeros(1), np.zeros(1, "f4"), np.zeros(1, "i8"),
        np.float64(0), np.array(["0"], object), np.array([0], object), Record(0.0), Record(1.0),
        Record(0.0, [1]), Finetune(), Finetune(eta=0.5), torch.float32, torch.float64, len, abs,
        np.add, np.multiply, torch.relu, torch.sigmoid, [].append, [1].append, nn.ReLU, nn.GELU,
        Record, range(2), range(3), slice(2), Path("a"), Path("b"),
        np.random.default_rng(0), np.random.default_rng(1),
        torch.Generator().manual_seed(0), torch.Generator().manual_seed(1),
    ]  # fmt: skip
    prints = [fingerprint(value) for value in values]
    assert len(set(prints)) == len(values), [
        value for value, each in zip(values, prints, strict=True) if prints.count(each) > 1
    ]
    assert all(len(each) == 64 and int(each, 16) >= 0 for each in prints)


def test_values_that_are_the_same():
    shared = [1.0, "x"]
    tensor = torch.arange(6.0).view(2, 3)
    pairs = [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([1, "x"], (1, "x")),
        ([shared, shared], [[1.0, "x"], [1.0, "x"]]),
        (tensor, tensor.T.contiguous().T),
        (torch.arange(6)[::2], torch.tensor([0, 2, 4])),
        (torch.complex(*tensor).conj(), torch.complex(tensor[0], -tensor[1])),
        (tensor, tensor.clone().requires_grad_()),
        (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
        (Record(1.0, note="x"), Record(1.0, note="y")),
        (torch.device("cpu"), torch.device("cuda", 1)),
    ]
    for one, other in pairs:
        assert fingerprint(one) == fingerprint(other), (one, other)


def test_what_cannot_be_read_goes_by_its_type():
    import threading

    locks, tensors = (threading.Lock(), threading.Lock()), (torch.zeros(2, device="meta"),)
    assert fingerprint(locks[0]) == fingerprint(locks[1]) != fingerprint(threading.Event)
    assert fingerprint(tensors) != fingerprint((locks[0],))


# ------------------------------------------------------------------------------- the library


def test_library_goes_by_name_so_that_its_edits_do_not_count(monkeypatch):
    edited = {}
    exec("def jpeg_compressibility(images, encoding='rescaled'): 'Edited.'; return 0", edited)
    before = fingerprint(rewards.jpeg_compressibility)
    code = rewards.jpeg_compressibility.__code__
    new = edited["jpeg_compressibility"].__code__
    monkeypatch.setattr(rewards.jpeg_compressibility, "__code__", new)
    monkeypatch.setattr(rewards.jpeg_compressibility, "__doc__", "Edited.")
    assert rewards.jpeg_compressibility.__code__ is not code
    assert fingerprint(rewards.jpeg_compressibility) == before
    assert fingerprint(rewards.jpeg_incompressibility) != before


def test_built_in_rewards_are_told_apart():
    head, other = encoders.AestheticHead(8).eval(), encoders.AestheticHead(8).eval()
    numbers = {"image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    network = nn.Linear(2, 2)
    clip = encoders.Clip(network, "tokenizer in /some/folder", **numbers)
    moved = encoders.Clip(network, "tokenizer in /another", **numbers)
    classifier = encoders.AgeClassifier(network, **numbers)
    wider = dataclasses.replace(classifier, std=(0.25,) * 3)
    different = [
        rewards.load("jpeg_compressibility"),
        rewards.load("jpeg_compressibility", jpeg_encoding="published"),
        rewards.load("jpeg_incompressibility"),
        rewards.aesthetic(clip, head),
        rewards.aesthetic(clip, other),
        rewards.aesthetic(dataclasses.replace(clip, image_size=64), head),
        rewards.over50(classifier),
        rewards.over50(wider),
        rewards.under30(classifier),
    ]
    assert len({fingerprint(each) for each in different}) == len(different)
    assert fingerprint(rewards.aesthetic(moved, head)) == fingerprint(different[3])


def test_objectives_functions_are_told_apart(own):
    ddpo = objectives.load("ddpo")
    mine = own("def loss(*_):\n    return 0, {}\n", "loss")
    assert len({fingerprint([ddpo.credit, each]) for each in (ddpo.loss, mine)}) == 2
    assert fingerprint(sys.modules[mine.__module__]) != fingerprint(ddpo)


def test_own_module_named_like_nothing_installed_is_ones_own(own):
    reward = own("def reward(images):\n    return images.mean((1, 2, 3))\n")
    assert not identity._is_installed(reward.__module__)
    assert not identity._is_installed("__main__")
    for name in ("torch._C._nn", "functools", "builtins", "numpy.random", "ddpo_lib.toy.faces"):
        assert identity._is_installed(name), name


# ------------------------------------------------------------------------------- other processes

SCRIPT = """
    import sys
    import torch
    from diffusers import DDPMScheduler
    from ddpo_lib import rewards
    from ddpo_lib.identity import fingerprint
    from ddpo_lib.policy import Policy, load

    names = {"a", "b", "c", "d", ("e", 1), frozenset({"f", "g"})}

    class Reward:
        def __init__(self):
            self.seen = {name: torch.ones(2) for name in names}

        def __call__(self, images):
            return sum(len(name) for name in names) * images.mean((1, 2, 3))

    def reward(images):
        return Reward()(images) if "jpeg" in {"jpeg", "png"} else None

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.linear = 2.0, torch.nn.Linear(2, 1)
            torch.nn.init.ones_(self.linear.weight), torch.nn.init.ones_(self.linear.bias)

        def forward(self, images):
            return self.linear(images.mean((2, 3))[:, :2]) * self.scale

    jpeg = rewards.load("jpeg_compressibility")
    print(fingerprint([names, reward, Reward(), lambda images: images, Net(), jpeg]))
    print(fingerprint(load(sys.argv[1], "cpu")))
"""


def test_other_process_folder_and_hash_seed_give_the_same(policy, tmp_path):
    policies.save(policy, tmp_path / "model")
    said = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        (folder / "script.py").write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "script.py", tmp_path / "model"],
            cwd=folder,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said[0] == said[1]
    assert said[0][1] == fingerprint(policy)
    assert isinstance(policy, Policy)


def test_tokenizer_is_the_same_in_every_folder_and_after_use(tmp_path):
    """It keeps its folder, and the padding of its last call."""
    here = paths.TOY / "text-to-image" / "tokenizer"
    there = shutil.copytree(here, tmp_path / "moved")
    first, moved = (AutoTokenizer.from_pretrained(folder) for folder in (here, there))
    before = fingerprint(first)
    first("a church", padding="max_length", max_length=7, truncation=True)
    assert before == fingerprint(first) == fingerprint(moved)
    moved.add_tokens(["cathedral"])
    assert fingerprint(moved) != before
