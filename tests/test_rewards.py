"""JPEG sizes against Pillow, the learned rewards' classes, own rewards and their mistakes."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_lib import encoders, rewards
from ddpo_lib.config import Models

MODELS = Models("no/clip", "no/aesthetic", "no/age")


def pictures(n=4, channels=3, size=16):
    """Smooth to noisy, so that their JPEG sizes differ."""
    noise = torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_size_is_the_files_size(tmp_path, channels):
    images = pictures(channels=channels)
    expected = file_sizes(images, tmp_path, lambda x: (x + 1) * 127.5)
    assert expected.diff().min() > 0
    torch.testing.assert_close(rewards.jpeg_kilobytes(images), expected)


def test_published_encoding_blackens_everything_below_mid_grey(tmp_path):
    images = pictures()
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


def test_uint8_and_back():
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    images = rewards.from_uint8(every_level)
    assert images.shape == (2, 3, 16, 16)
    assert (images.min(), images.max()) == (-1, 1)
    assert rewards.to_uint8(images).equal(every_level)


def test_unknown_encoding_is_an_error():
    with pytest.raises(ValueError, match=r"'webp': must be one of \('rescaled', 'published'\)"):
        rewards.to_uint8(pictures(), "webp")


def test_jpeg_rewards_prefer_small_or_large_files():
    images = pictures()
    small = rewards.load("jpeg_compressibility", MODELS)(images)
    large = rewards.load("jpeg_incompressibility", MODELS)(images)
    assert small.argmax() == 0  # the smoothest
    assert large.argmax() == 3  # the noisiest
    assert large.equal(rewards.jpeg_kilobytes(images))
    assert small.equal(-large)
    published = rewards.load("jpeg_incompressibility", MODELS, jpeg_encoding="published")
    assert published(images).equal(rewards.jpeg_kilobytes(images, "published"))


@pytest.mark.parametrize("name, classes", [("over50", [6, 7, 8]), ("under30", [0, 1, 2, 3])])
def test_age_rewards_sum_the_logits_of_their_classes(monkeypatch, name, classes):
    """Logits, not probabilities, of the nine classes 0–2, 3–9, 10–19, …, more than 70."""
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)) * 3
    monkeypatch.setattr(encoders, "load_age_classifier", lambda source, device=None: "classifier")
    monkeypatch.setattr(encoders, "age_logits", lambda classifier, images: logits)
    expected = torch.stack([logits[:, i] for i in classes]).sum(0)
    torch.testing.assert_close(rewards.load(name, MODELS)(pictures()), expected)


# ------------------------------------------------------------------------------- own rewards


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(body): writes a module with a function reward(images), returns the reward loaded."""

    def load(body, name="reward"):
        module = f"my_reward_{abs(hash(body))}"
        (tmp_path / f"{module}.py").write_text(f"import torch\ndef reward(images):\n    {body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return rewards.load(f"{module}:{name}", MODELS)

    return load


@pytest.mark.parametrize(
    "body",
    [
        "return images.amax((1, 2, 3))",
        "return images.amax((1, 2, 3)).double().numpy()",
        "return [float(image.max()) for image in images]",
        "return images.requires_grad_().amax((1, 2, 3))",
    ],
)
def test_own_reward(own, body):
    values = own(body)(pictures())
    assert values.dtype == torch.float32
    assert not values.requires_grad
    assert values.equal(pictures().amax((1, 2, 3)))


@pytest.mark.parametrize(
    "name, message",
    [
        ("beauty", r"unknown reward 'beauty': choose one of \('jpeg_compressibility', .*'under30'"),
        ("no_such_module:reward", "cannot import the reward 'no_such_module:reward': No module"),
        ("ddpo_lib.paths:reward", "cannot import the reward .* has no attribute 'reward'"),
    ],
)
def test_unknown_reward_is_one_clear_error(name, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(name, MODELS)


@pytest.mark.parametrize(
    "body, kind, message",
    [
        ("return images.sum()", ValueError, r"shape \(\) for 4 pictures: .* shape \(4,\)"),
        ("return images[:, 0, 0, :1]", ValueError, r"returned shape \(4, 1\)"),
        ("return torch.zeros(3)", ValueError, r"returned shape \(3,\)"),
        ("return torch.tensor([0, 1, torch.nan, 2])", ValueError, r"not finite .* \[2\]: nan"),
        ("return torch.tensor([0, -torch.inf, 1, 2])", ValueError, r"not finite .* \[1\]: -inf"),
        ("raise KeyError('lost')", RuntimeError, "my_reward_.* raised KeyError: 'lost'"),
        ("return None", RuntimeError, "my_reward_.* raised "),
    ],
)
def test_own_rewards_mistake_is_one_clear_error(own, body, kind, message):
    with pytest.raises(kind, match=message):
        own(body)(pictures())
