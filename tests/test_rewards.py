"""JPEG sizes against Pillow, the learned rewards' classes, own rewards and what is refused."""

import functools
import inspect
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_lib import encoders, rewards


def images_of(n=4, channels=3, height=16, width=16):
    """Smooth to noisy, so that their JPEG sizes differ."""
    noise = torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * torch.linspace(0.05, 0.8, n).view(-1, 1, 1, 1)).clamp(-1.2, 1.2)


def file_sizes(images, folder, scale):
    """kB of JPEG files of quality 95 written by Pillow, from pixels scale(x)."""
    sizes = []
    for i, image in enumerate(images.numpy()):
        pixels = np.clip(np.rint(scale(image.astype(np.float64))), 0, 255).astype(np.uint8)
        pixels = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
        file = folder / f"{i}.jpg"
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, quality=95)
        sizes.append(file.stat().st_size / 1000)
    return torch.tensor(sizes)


# ------------------------------------------------------------------------------- JPEG


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", [(16, 16), (24, 8), (8, 24), (1, 16), (16, 1), (1, 1)])
def test_jpeg_size_is_the_files_size(tmp_path, channels, height, width):
    images = images_of(4, channels, height, width)
    expected = file_sizes(images, tmp_path, lambda x: (x + 1) * 127.5)
    if min(height, width) >= 8:
        assert expected.diff().min() > 0
    sizes = rewards.jpeg_kilobytes(images)
    assert sizes.dtype == torch.float32
    torch.testing.assert_close(sizes, expected)


def test_no_images_have_no_sizes():
    assert rewards.checked(rewards.jpeg_compressibility)(torch.zeros(0, 3, 8, 8)).shape == (0,)


def test_published_encoding_blackens_everything_below_mid_grey(tmp_path):
    images = images_of()
    expected = file_sizes(images, tmp_path, lambda x: x * 255)
    torch.testing.assert_close(rewards.jpeg_kilobytes(images, "published"), expected)
    assert (rewards.to_uint8(images.clamp(max=0), "published") == 0).all()
    dark = images.clamp(-1, 0) - 0.1
    sizes = rewards.jpeg_kilobytes(dark, "published")
    black = rewards.jpeg_kilobytes(torch.full_like(dark, -1.0))
    assert sizes.equal(black)
    assert not rewards.jpeg_kilobytes(dark).equal(black)


def test_grey_levels():
    levels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]).view(-1, 1, 1, 1)
    assert rewards.to_uint8(levels).view(-1).tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert rewards.to_uint8(levels, "published").view(-1).tolist() == [0, 0, 0, 0, 128, 255, 255]


def test_jpeg_rewards_prefer_small_or_large_files():
    images = images_of()
    small = rewards.load("jpeg_compressibility")(images)
    large = rewards.load("jpeg_incompressibility")(images)
    assert small.argmax() == 0  # the smoothest
    assert large.argmax() == 3  # the noisiest
    assert large.equal(rewards.jpeg_kilobytes(images))
    assert small.equal(-large)
    published = rewards.load("jpeg_incompressibility", jpeg_encoding="published")
    assert published(images).equal(rewards.jpeg_kilobytes(images, "published"))


# ------------------------------------------------------------------------------- learned


class Logits(torch.nn.Module):
    """In the place of the age classifier's network: fixed logits of the nine classes."""

    def __init__(self):
        super().__init__()
        fixed = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)) * 3
        self.fixed = torch.nn.Parameter(fixed, requires_grad=False)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.fixed[: len(pixel_values)])


class MeanColour(torch.nn.Module):
    """In the place of CLIP's network."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode_image(self, images):
        return images.mean((2, 3)) * self.weight


INPUTS = {"image_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
CLASSIFIER = encoders.AgeClassifier(Logits(), **INPUTS)
CLIP = encoders.Clip(MeanColour(), None, **INPUTS)
LEARNED = {
    "over50": rewards.over50(CLASSIFIER),
    "under30": rewards.under30(CLASSIFIER),
    "aesthetic": rewards.aesthetic(CLIP, encoders.AestheticHead(3).eval()),
}


@pytest.mark.parametrize("name, classes", [("over50", [6, 7, 8]), ("under30", [0, 1, 2, 3])])
def test_age_rewards_sum_the_logits_of_their_classes(name, classes):
    """Logits, not probabilities, of the nine classes 0–2, 3–9, 10–19, …, more than 70."""
    expected = torch.stack([CLASSIFIER.model.fixed[:, i] for i in classes]).sum(0)
    torch.testing.assert_close(LEARNED[name](images_of()), expected)


def test_aesthetic_is_the_head_on_normalised_embeddings():
    torch.manual_seed(0)
    head = encoders.AestheticHead(3).eval()
    colours = images_of().mean((2, 3))
    expected = head(colours / colours.norm(dim=1, keepdim=True))
    torch.testing.assert_close(rewards.aesthetic(CLIP, head)(images_of()), expected)


def test_load_finds_models_by_their_names(monkeypatch):
    asked = []

    def loader(result):
        return lambda source, device=None: asked.append((source, device)) or result

    monkeypatch.setattr(encoders, "load_age_classifier", loader(CLASSIFIER))
    monkeypatch.setattr(encoders, "load_clip", loader(CLIP))
    monkeypatch.setattr(encoders, "load_aesthetic_head", loader(encoders.AestheticHead(3)))
    monkeypatch.setattr(encoders, "embed_texts", lambda clip, texts: torch.ones(len(texts), 3))
    sources = {"clip": "some/clip", "aesthetic": "some/head", "age": "some/age"}
    for name, models in rewards.MODELS.items():
        asked.clear()
        reward = rewards.load(name, sources, "cpu")
        assert asked == [(f"some/{'head' if m == 'aesthetic' else m}", "cpu") for m in models]
        assert rewards.name(reward) == name
        prompts = (["a cat"] * 4,) if rewards.needs_prompts(reward) else ()
        assert reward(images_of(), *prompts).shape == (4,)
        with pytest.raises(ValueError, match=rf"{name}.*: name a source of \['{models[-1]}'\]"):
            rewards.load(name, {**sources, models[-1]: ""})
        with pytest.raises(ValueError, match="name a source of"):
            rewards.load(name)


def test_over50_and_under30_are_not_mistaken_for_each_other(monkeypatch):
    monkeypatch.setattr(encoders, "load_age_classifier", lambda *_: CLASSIFIER)
    for name in ("over50", "under30"):
        loaded = rewards.load(name, {"age": "some/age"})
        assert loaded(images_of()).equal(LEARNED[name](images_of()))


# ------------------------------------------------------------------------------- images refused

REWARDS = {
    "jpeg": rewards.jpeg_compressibility,
    "to_uint8": rewards.to_uint8,
    "own": rewards.checked(lambda images: torch.zeros(len(images))),
    **LEARNED,
}


@pytest.fixture(params=REWARDS)
def looks(request):
    """Whatever looks at images."""
    return REWARDS[request.param]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_images_that_are_not_finite_are_named(looks, value):
    images = images_of()
    looks(images)
    images[1, 2, 3, 4] = images[3, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"^images \[1, 3\] are not finite"):
        looks(images)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 3, 8, 8).byte(), r"got torch.uint8 of shape \(2, 3, 8, 8\).*from_uint8"),
        (torch.zeros(2, 3, 8, 8).long(), "got torch.int64"),
        (torch.zeros(3, 8, 8), r"float tensor \(N, C, H, W\).*got torch.float32 of shape \(3, 8, "),
        (np.zeros((2, 3, 8, 8)), "got float64 of shape"),
        (torch.linspace(0, 255, 2 * 3 * 256).view(2, 3, 16, 16), r"got 0 to 255: .* by 127.5"),
    ],
)
def test_what_no_policy_draws_is_refused(looks, images, message):
    with pytest.raises(ValueError, match=message):
        looks(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_size_are_images(dtype):
    assert rewards.to_uint8(torch.zeros(1, 3, 8, 8, dtype=dtype)).unique().tolist() == [128]


def test_what_a_policy_without_clipping_draws_is_taken():
    rewards.to_uint8(images_of() * 100)  # far outside, but to both sides
    rewards.to_uint8(images_of().abs())  # 0…1 cannot be told from a bright image
    rewards.to_uint8(images_of().abs() + 1)


# ------------------------------------------------------------------------------- own rewards


def brightest(images):
    return images.amax((1, 2, 3))


def with_gradient(images):
    with torch.enable_grad():
        return images.requires_grad_().amax((1, 2, 3)) * 1.0


def in_place(images):
    return images.mul_(2).amax((1, 2, 3)) / 2


@pytest.mark.parametrize(
    "reward",
    [
        brightest,
        with_gradient,
        in_place,
        lambda images: brightest(images).double(),
        lambda images: brightest(images).numpy(),
        lambda images: brightest(images).double().numpy(),
        lambda images: brightest(images).flip(0).numpy()[::-1],
        lambda images: [float(image.max()) for image in images],
        lambda images: tuple(image.max() for image in images),
        lambda images: [np.float32(image.max()) for image in images],
        functools.partial(lambda images, scale: brightest(images) * scale, scale=1.0),
        torch.inference_mode()(brightest),
    ],
)
def test_own_reward(reward):
    images = images_of()
    before = images.clone()
    values = rewards.checked(reward)(images)
    assert isinstance(values, torch.Tensor) and values.dtype == torch.float32
    assert not values.requires_grad and not images.requires_grad
    assert values.equal(brightest(before))
    assert images.equal(before)


def test_whole_numbers_are_numbers():
    values = rewards.checked(lambda images: list(range(len(images))))(images_of())
    assert values.tolist() == [0, 1, 2, 3] and values.dtype == torch.float32


def test_rewards_network_keeps_no_graph():
    seen = []
    rewards.checked(lambda images: seen.append(torch.is_grad_enabled()) or [0.0])(images_of(1))
    assert seen == [False]


def test_checking_twice_is_checking_once():
    once = rewards.checked(brightest)
    assert rewards.checked(once)(images_of()).equal(once(images_of()))


def test_reward_that_raises_is_named_and_its_error_kept():
    def taste(images):
        raise KeyError("lost")

    with pytest.raises(RuntimeError, match="reward 'taste' raised KeyError: 'lost'") as caught:
        rewards.checked(taste)(images_of())
    assert isinstance(caught.value.__cause__, KeyError)


def test_bad_images_are_not_the_rewards_fault():
    def taste(images):
        raise AssertionError("was asked")

    with pytest.raises(FloatingPointError, match=r"^images \[0, 1\] are not finite"):
        rewards.checked(taste)(torch.full((2, 3, 8, 8), torch.nan))


def test_importing_rewards_loads_no_heavy_library():
    heavy = "diffusers transformers open_clip huggingface_hub torchvision sklearn pandas accelerate"
    script = f"""
import sys
from ddpo_lib import diversity, encoders, hub, identity, rewards
rewards.checked(rewards.load("jpeg_compressibility"))
print([name for name in {heavy.split()} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ------------------------------------------------------------------------------- signatures


class Taste:
    def __call__(self, images):
        return images.mean((1, 2, 3))

    def of_both(self, images, prompts):
        return [float(len(prompt)) for prompt in prompts]


class Network(torch.nn.Module):
    def forward(self, images):
        return images.mean((1, 2, 3))


class TextNetwork(torch.nn.Module):
    def forward(self, images, prompts):
        return images.mean((1, 2, 3)) + len(prompts)


@pytest.mark.parametrize(
    "reward, needs",
    [
        (lambda images: 0, False),
        (lambda images, prompts: 0, True),
        (lambda images, prompts=None: 0, False),
        (lambda images, *more, k=1, **others: 0, False),
        (lambda images, prompts, k=1: 0, True),
        (functools.partial(lambda scale, images: 0, 2.0), False),
        (functools.partial(lambda images, prompts, model: 0, model=1), True),
        (Taste(), False),
        (Taste().of_both, True),
        (Network(), False),
        (TextNetwork(), True),
        (rewards.load("jpeg_compressibility"), False),
        (LEARNED["over50"], False),
        (LEARNED["aesthetic"], False),
    ],
)
def test_reward_of_images_or_of_images_and_prompts(reward, needs):
    assert rewards.needs_prompts(reward) is needs


def test_prompts_reach_the_reward_that_reads_them():
    prompts = ["a", "bb", "ccc", ""]
    judge = rewards.checked(Taste().of_both)
    assert judge(images_of(), prompts).tolist() == [1, 2, 3, 0]
    assert judge(images_of(), tuple(prompts)).tolist() == [1, 2, 3, 0]
    for wrong in (None, prompts[:3]):
        with pytest.raises(ValueError, match=r"reads prompts: 4 images and \d prompts"):
            judge(images_of(), wrong)
    assert rewards.checked(brightest)(images_of(), prompts).equal(brightest(images_of()))


@pytest.mark.parametrize(
    "reward, name",
    [
        (brightest, "brightest"),
        (Taste(), "Taste"),
        (Network(), "Network"),
        (functools.partial(functools.partial(brightest)), "brightest"),
        (LEARNED["under30"], "under30"),
        (LEARNED["aesthetic"], "aesthetic"),
        (rewards.load("jpeg_incompressibility"), "jpeg_incompressibility"),
    ],
)
def test_name(reward, name):
    assert rewards.name(reward) == name


# ------------------------------------------------------------------------------- own by name


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(source): writes a module, returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        module = f"my_reward_{len(list(tmp_path.iterdir()))}_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        return module

    return write


def test_own_reward_by_its_name(own):
    module = own("def taste(images):\n    '''Größe.'''\n    return images.amax((1, 2, 3))\n")
    reward = rewards.load(f"{module}:taste")
    assert inspect.isfunction(reward)  # as it is, for its fingerprint
    assert rewards.checked(reward)(images_of()).equal(brightest(images_of()))


@pytest.mark.parametrize(
    "source, error", [("def taste(:", SyntaxError), ("1 / 0", ZeroDivisionError)]
)
def test_module_that_fails_is_named_and_its_error_kept(own, source, error):
    module = own(source)
    with pytest.raises(
        ValueError, match=f"the reward '{module}:taste': {error.__name__}"
    ) as caught:
        rewards.load(f"{module}:taste")
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_header_is_what_all_files_share(channels):
    """Up to the scan's data, and the end marker; the rest of a flat image is a few bytes."""
    rng = np.random.default_rng(0)
    shape = (16, 16) if channels == 1 else (16, 16, 3)
    files = [rewards._jpeg(rng.integers(0, 256, shape).astype(np.uint8)) for _ in range(8)]
    header = round(1000 * rewards.jpeg_header_kilobytes(channels)) - 2
    assert len({file[:header] for file in files}) == 1
    assert len({file[header : header + 8] for file in files}) > 1
    assert all(file.endswith(b"\xff\xd9") for file in files)
    assert files[0][header - 3 : header] == bytes([0, 63, 0])  # the end of a baseline scan's header
