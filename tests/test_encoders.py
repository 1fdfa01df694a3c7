"""CLIP, the aesthetic head, the age classifier: what their own libraries answer, and errors."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import ViTForImageClassification, ViTImageProcessor

from ddpo_lib import encoders, rewards
from ddpo_lib.identity import fingerprint
from ddpo_lib.toy.drawing import to_tensor
from ddpo_lib.toy.training import draw

TOY = Path(__file__).resolve().parents[1] / "data" / "toy"


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return draw("faces", 8, seed=0).pictures


@pytest.fixture(scope="module")
def clip() -> encoders.Clip:
    return encoders.load_clip(TOY / "clip")


@pytest.fixture
def copy(tmp_path):
    """copy("clip"): a toy model's folder that a test may damage."""
    return lambda name: shutil.copytree(TOY / name, tmp_path / name)


def truncate(file) -> None:
    file.write_bytes(file.read_bytes()[:1000])


# ------------------------------------------------------------------------------- preprocessing

NUMBERS = {"image_size": 32, "mean": (0.48, 0.45, 0.4), "std": (0.27, 0.26, 0.25)}
NOISE = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)


def test_larger_pictures_are_prepared_for_the_classifier_as_transformers_does():
    size = {"height": 32, "width": 32}
    processor = ViTImageProcessor(
        size=size, resample=2, image_mean=NUMBERS["mean"], image_std=NUMBERS["std"]
    )
    expected = processor([Image.fromarray(p) for p in NOISE], return_tensors="pt").pixel_values
    classifier = encoders.AgeClassifier(None, **NUMBERS)
    ours = encoders._prepare(to_tensor(NOISE), classifier, encoders._resize_levels)
    assert_close(ours, expected, rtol=0, atol=1e-5)


def test_larger_pictures_are_prepared_for_clip_as_open_clip_does_but_for_rounding():
    transform = open_clip.image_transform(
        32, is_train=False, mean=NUMBERS["mean"], std=NUMBERS["std"], interpolation="bicubic"
    )
    grey = NOISE[:, :12, :12] // 2 + 64  # nothing overshoots black or white, where PIL clamps
    smooth = np.stack([np.array(Image.fromarray(picture).resize((48, 48))) for picture in grey])
    expected = torch.stack([transform(Image.fromarray(picture)) for picture in smooth])
    ours = encoders._prepare(
        to_tensor(smooth), encoders.Clip(None, None, **NUMBERS), encoders._resize
    )
    levels = (ours - expected).abs() * torch.tensor(NUMBERS["std"])[:, None, None] * 255
    assert levels.max() < 2
    assert levels.mean() < 0.5


def test_gradient_through_rounded_resize_is_that_of_a_smooth_one():
    images = (to_tensor(NOISE) * 0.9).requires_grad_()
    weights = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rounded = encoders._resize_levels(images, 32)
    (ours,) = torch.autograd.grad((rounded * weights).sum(), images)
    smooth = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    (expected,) = torch.autograd.grad((smooth * weights).sum(), images)
    assert 0 < (rounded - smooth).abs().max() < 3 / 255
    assert_close(ours, expected)


# ------------------------------------------------------------------------------- CLIP


def test_image_embeddings_are_those_of_open_clips_own_pipeline(clip, pictures):
    """Its transform resizes 8-bit pictures with PIL, ours tensors; the difference is rounding."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TOY / 'clip'}")
    batch = torch.stack([preprocess(Image.fromarray(picture)) for picture in pictures])
    with torch.no_grad():
        expected = model.eval().encode_image(batch, normalize=True)
    ours = encoders.embed_images(clip, to_tensor(pictures))
    assert_close(ours.norm(dim=1), torch.ones(8))
    assert (ours * expected).sum(1).min() > 0.999


def test_text_embeddings_are_those_of_open_clip(clip):
    folder = f"local-dir:{TOY / 'clip'}"
    model, _, _ = open_clip.create_model_and_transforms(folder)
    texts = ["an old person", "a church at night"]
    with torch.no_grad():
        expected = model.eval().encode_text(open_clip.get_tokenizer(folder)(texts), normalize=True)
    assert_close(encoders.embed_texts(clip, texts), expected)


def test_image_embeddings_do_not_depend_on_the_batch_and_are_differentiable(clip, pictures):
    images = to_tensor(pictures).requires_grad_()
    whole = encoders.embed_images(clip, images)
    assert_close(encoders.embed_images(clip, images, batch_size=3), whole, rtol=1e-4, atol=1e-5)
    whole.sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(p.requires_grad for p in clip.model.parameters())


def test_image_that_is_not_square_is_an_error(clip):
    with pytest.raises(ValueError, match=r"square RGB images \(N, 3, S, S\), got \(1, 3, 8, 9\)"):
        encoders.embed_images(clip, torch.zeros(1, 3, 8, 9))


@pytest.mark.parametrize("source", ["no/such/folder", "ViT-L-14:nobody"])
def test_unknown_clip_is_an_error(source):
    with pytest.raises(FileNotFoundError, match="ViT-L-14:openai"):
        encoders.load_clip(source)


def test_damaged_clip_is_an_error(copy):
    folder = copy("clip")
    truncate(folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="cannot be read as a CLIP model"):
        encoders.load_clip(folder)


@pytest.mark.parametrize("file", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_clip_without_a_file_is_an_error_that_names_it(copy, file):
    folder = copy("clip")
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        encoders.load_clip(folder)


def test_clip_with_a_damaged_config_is_an_error(copy):
    folder = copy("clip")
    truncate(folder / "open_clip_config.json")
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a CLIP"):
        encoders.load_clip(folder)


# ------------------------------------------------------------------------------- aesthetic head


def test_head_has_the_published_layers():
    """Their names and sizes are what makes the published weights load."""
    shapes = {
        name: tuple(value.shape) for name, value in encoders.AestheticHead().state_dict().items()
    }
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    assert shapes == {
        f"layers.{i}.{part}": size if part == "weight" else size[:1]
        for i, size in sizes.items()
        for part in ("weight", "bias")
    }


def test_head_reads_its_input_size_from_the_weights(tmp_path):
    head = encoders.AestheticHead(12).eval()
    save_file(head.state_dict(), tmp_path / "model.safetensors")
    loaded = encoders.load_aesthetic_head(tmp_path)
    x = torch.randn(3, 12)
    assert_close(loaded(x), head(x))
    assert loaded(x).shape == (3,)


def test_head_of_another_model_or_truncated_is_an_error(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        encoders.load_aesthetic_head(tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be read as an aesthetic head"):
        encoders.load_aesthetic_head(tmp_path)
    folder = copy("aesthetic")
    truncate(folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be read as an aesthetic head"):
        encoders.load_aesthetic_head(folder)


# ------------------------------------------------------------------------------- age


def test_age_logits_are_those_of_transformers_own_pipeline(pictures):
    processor = ViTImageProcessor.from_pretrained(TOY / "age")
    model = ViTForImageClassification.from_pretrained(TOY / "age").eval()
    with torch.no_grad():
        expected = model(**processor(list(pictures), return_tensors="pt")).logits
    classifier = encoders.load_age_classifier(TOY / "age")
    ours = encoders.age_logits(classifier, to_tensor(pictures), batch_size=3)
    assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_classifier_of_other_classes_is_an_error(copy):
    folder = copy("age")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["3"] = "twenties"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"nine classes 0-2, 3-9.*it has .*twenties"):
        encoders.load_age_classifier(folder)


def test_classifier_that_lacks_weights_is_an_error(copy):
    folder = copy("age")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the weights"):
        encoders.load_age_classifier(folder)


def test_damaged_or_missing_classifier_is_an_error(copy):
    folder = copy("age")
    truncate(folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be read as a ViTForImageClassification"):
        encoders.load_age_classifier(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        encoders.load_age_classifier(folder)
    with pytest.raises(FileNotFoundError, match="nateraw/vit-age-classifier"):
        encoders.load_age_classifier("no/such/folder")
    with pytest.raises(
        FileNotFoundError, match="'nobody/nothing', the id of a model on the Hugging"
    ):
        encoders.load_age_classifier("nobody/nothing")


# ------------------------------------------------------------------------------- published formats


@pytest.fixture
def published_head(tmp_path, monkeypatch):
    """A head in the format of the published file, which is taken for that file."""
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(encoders.AestheticHead(12).state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(encoders, "LAION_HEAD_SHA256", digest)
    return file


def test_head_loads_from_the_published_format(published_head):
    head = encoders.load_aesthetic_head(published_head, "cpu")
    state = torch.load(published_head, weights_only=True)
    assert all(head.state_dict()[name].equal(value) for name, value in state.items())
    assert not head.training


def test_any_other_pickle_is_refused_before_it_is_read(published_head, monkeypatch):
    def read(*_, **__):
        raise AssertionError("an unknown pickle was opened")

    monkeypatch.setattr(encoders.torch, "load", read)
    published_head.write_bytes(published_head.read_bytes() + b"0")
    with pytest.raises(
        ValueError, match=r"not the head that LAION published.*its sha256 is [0-9a-f]"
    ):
        encoders.load_aesthetic_head(published_head)


def test_published_hash():
    """Of sac+logos+ava1-l14-linearMSE.pth; the file itself is no part of this project."""
    assert encoders.LAION_HEAD_SHA256.startswith("21dd590f3ccdc646f0d53120778b2960")


def test_head_loads_from_a_file_of_safetensors(tmp_path):
    head = encoders.AestheticHead(12)
    save_file(head.state_dict(), tmp_path / "mine.safetensors")
    x = torch.ones(1, 12)
    assert encoders.load_aesthetic_head(tmp_path / "mine.safetensors")(x).equal(head.eval()(x))


def test_missing_published_head_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth is missing"):
        encoders.load_aesthetic_head(tmp_path / "nothing.pth")


# ------------------------------------------------------------------------------- fingerprints


def test_fingerprint_is_that_of_what_looks_and_not_of_where_it_lies(copy, clip):
    head = encoders.load_aesthetic_head(TOY / "aesthetic")
    ours = rewards.aesthetic(clip, head)
    models = {name: str(copy(name)) for name in ("clip", "aesthetic", "age")}
    assert fingerprint(rewards.load("aesthetic", models)) == fingerprint(ours)
    assert fingerprint(rewards.load("aesthetic", models, "cpu")) == fingerprint(ours)
    classifier = encoders.load_age_classifier(TOY / "age")
    over50 = fingerprint(rewards.over50(classifier))
    assert fingerprint(rewards.load("over50", models)) == over50
    classifier.model.classifier.bias.data[8] += 1e-3
    assert fingerprint(rewards.over50(classifier)) != over50
    clip.model.logit_scale.data += 1e-3
    changed = fingerprint(ours)
    clip.model.logit_scale.data -= 1e-3
    assert changed != fingerprint(rewards.load("aesthetic", models))


# ------------------------------------------------------------------------------- learned rewards


def test_learned_rewards_of_the_toy_models_agree_with_their_parts(clip, pictures):
    images = to_tensor(pictures)
    models = {name: str(TOY / name) for name in ("clip", "aesthetic", "age")}
    head = encoders.load_aesthetic_head(models["aesthetic"])
    score = rewards.checked(rewards.load("aesthetic", models))
    assert_close(score(images), head(encoders.embed_images(clip, images)))
    logits = encoders.age_logits(encoders.load_age_classifier(models["age"]), images)
    assert_close(rewards.checked(rewards.load("over50", models))(images), logits[:, 6:].sum(1))
    assert_close(rewards.checked(rewards.load("under30", models))(images), logits[:, :4].sum(1))
