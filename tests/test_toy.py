"""The toy world: pictures are what is said of them, shipped models are as good as told."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from sklearn.metrics import roc_auc_score

from ddpo_lib import encoders
from ddpo_lib.book import paths
from ddpo_lib.toy import aesthetic, churches, faces, make, policies, quality, regressor
from ddpo_lib.toy import encoders as toy_encoders
from ddpo_lib.toy.drawing import to_tensor
from ddpo_lib.toy.training import DOMAINS, augment, draw

domains = pytest.mark.parametrize("domain", DOMAINS)


# ------------------------------------------------------------------------------- drawing


@domains
def test_seed_decides_the_pictures(domain):
    drawn, again, other = draw(domain, 12, 3), draw(domain, 12, 3), draw(domain, 12, 4)
    assert drawn.pictures.shape == (12, 64, 64, 3) and drawn.pictures.dtype == np.uint8
    assert (drawn.pictures == again.pictures).all()
    assert (drawn.pictures != other.pictures).any()
    assert {len(values) for values in drawn.factors.values()} == {12}


@domains
def test_picture_depends_on_its_own_factors_only(domain):
    drawn = draw(domain, 6, 0)
    alone = {name: values[4:5] for name, values in drawn.factors.items()}
    assert (DOMAINS[domain].draw(alone)[0] == drawn.pictures[4]).all()


def test_few_faces_are_fifty_or_over():
    age = faces.sample_factors(40_000, np.random.default_rng(0))["age"]
    assert 0.05 < (age >= 50).mean() < 0.08
    assert age.min() >= 0 and age.max() <= 85


def test_balanced_ages_fill_every_class():
    age = draw("faces", 90, 0, age_balanced=1.0).factors["age"]
    assert set(toy_encoders.age_class(age)) == set(range(9))


@pytest.mark.parametrize(
    "age, expected", [(0, 0), (2.9, 0), (3, 1), (10, 2), (49.9, 5), (50, 6), (70, 8), (85, 8)]
)
def test_age_classes_are_fairfaces(age, expected):
    assert toy_encoders.age_class(np.array([age])) == [expected]


@domains
def test_captions_tell_the_truth(domain):
    """What a caption says of an attribute is so; what it leaves out is left open."""
    rng = np.random.default_rng(0)
    artist = DOMAINS[domain]
    factors = artist.sample_factors(4000, rng)
    captions = artist.captions(factors, rng)
    words = {  # attribute -> what says yes, what says no
        "glasses": ("glasses", "no glasses"),
        "beard": ("beard", "no beard"),
        "smiling": ("smiling", "serious"),
        "dark_skin": ("dark skin", "light skin"),
        "night": ("at night", "in daylight"),
        "dome": (" dome", " tower"),
        "hills": ("hills behind", "flat horizon"),
        "many_windows": ("many windows", "few windows"),
        "trees": (" trees", "no trees"),
    }
    for name in set(words) & set(artist.ATTRIBUTES):
        yes, no = words[name]
        truth = artist.ATTRIBUTES[name][2](factors)
        denies = np.array([no in caption for caption in captions])
        affirms = np.array([yes in caption.replace(no, "") for caption in captions])
        assert affirms.sum() > 50 and denies.sum() > 50, name
        assert truth[affirms].all(), name
        assert not truth[denies].any(), name


@domains
def test_taste_is_standardised(domain):
    taste = DOMAINS[domain].taste(DOMAINS[domain].sample_factors(20_000, np.random.default_rng(1)))
    assert abs(taste.mean()) < 0.1 and abs(taste.std() - 1) < 0.15


def test_taste_prefers_what_it_says():
    face = faces.sample_factors(20_000, np.random.default_rng(0))
    taste = faces.taste(face)
    for better in (face["hair_length"], -faces.apparent_age(face), face["light_warmth"]):
        assert np.corrcoef(taste, better)[0, 1] > 0.1
    church = churches.sample_factors(20_000, np.random.default_rng(0))
    taste = churches.taste(church)
    for better in (church["light"], church["trees"]):
        assert np.corrcoef(taste, better)[0, 1] > 0.3


def test_augmented_pictures_stay_close():
    torch.manual_seed(0)
    clean = to_tensor(draw("faces", 16, 0).pictures)
    rough = augment(clean)
    assert rough.shape == clean.shape and rough.abs().max() <= 1
    assert 0.01 < (rough - clean).abs().mean() < 0.15


# ------------------------------------------------------------------------------- measures


def test_precision_and_recall_of_the_same_and_of_distant_sets():
    points = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    assert quality.precision_recall(points, points) == (1, 1)
    assert quality.precision_recall(points, points + 100) == (0, 0)


def test_collapse_keeps_precision_and_loses_recall():
    """Generated points in one of two clusters: all plausible, half of the world missing."""
    near = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    real = torch.cat([near, near + 50])
    precision, recall = quality.precision_recall(real, near)
    assert precision == 1 and recall == 0.5
    assert quality.precision_recall(near, real) == (0.5, 1)


def test_radius_is_the_distance_to_the_kth_other_point():
    """On a line at 0, 1, 2, …: a point 1.5 beyond the end lies within k = 2 and not within 1."""
    real = torch.arange(10.0)[:, None]
    outside = torch.tensor([[10.5]] * 10)
    assert quality.precision_recall(real, outside, neighbours=1)[0] == 0
    assert quality.precision_recall(real, outside, neighbours=2)[0] == 1


def test_auc_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.2
    scores = np.round(rng.normal(size=300) + truth, 1)  # rounded, so that there are ties
    assert quality.auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)


def test_bradley_terry_by_hand():
    preferred, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    p = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(2))
    expected = -(np.log(p[0]) + np.log(p[1])) / 2
    assert aesthetic.bradley_terry_loss(preferred, other).item() == pytest.approx(expected)


def test_rater_is_noisy_in_the_right_direction():
    n = 20_000
    rng = np.random.default_rng(0)
    chosen = aesthetic.rate(np.full(n, 0.3), np.zeros(n), rng).mean()
    assert chosen == pytest.approx(1 / (1 + np.exp(-0.3 / aesthetic.TEMPERATURE)), abs=0.015)


def test_first_step_by_hand():
    """A first state that foretells the low-pass sample, one that foretells its negative."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(1, 255, size=(2, 8, 8, 3)).astype(np.uint8)
    final = coarse.repeat(8, axis=1).repeat(8, axis=2)
    first = final.copy()
    first[1] = 255 - first[1]
    first[0, :16, :, 1] = 255  # a quarter of its pixels, an eighth of both
    told = quality.first_step(quality.Samples(final, final, first))
    assert told["saturated"] == 0.125
    clean = quality.first_step(quality.Samples(final, final, final))
    assert clean == {"correlation": pytest.approx(1), "saturated": 0}
    opposite = quality.first_step(quality.Samples(final, final, 255 - final))
    assert opposite["correlation"] == pytest.approx(-1)


def test_contact_sheet_shows_the_pictures_in_reading_order():
    pictures = draw("churches", 6, 0).pictures
    sheet = np.asarray(quality.contact_sheet(pictures, columns=3))
    assert sheet.shape == (128, 192, 3)
    assert (sheet[64:, 64:128] == pictures[4]).all()


def test_two_regressors_agree_where_they_read_the_same():
    drawn = draw("faces", 30, 0)
    model = regressor._network(25).eval()
    scale = {"faces": [], "churches": []}
    one = regressor.Regressor(
        model, {name: list(of) for name, of in regressor.TARGETS.items()}, scale
    )
    same = quality.agreement([one, one], drawn.pictures, "faces")
    assert set(same) == set(regressor.TARGETS["faces"])
    assert all(value == pytest.approx(1) for value in same.values())


# ------------------------------------------------------------------------------- training


def test_policy_learns_v(tmp_path):
    """Of one picture v is a function of x_t alone, so a few steps come below the mean square of v,
    which is 1 at the latest steps; of eps, or of v with the wrong sign, they would not."""
    pictures = np.full((1, 64, 64, 3), 255, np.uint8)
    pipeline = policies.train_policy(pictures, 40, seed=0, batch_size=8)
    x_T = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = pipeline.unet(x_T, torch.tensor(999)).sample
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert (v + 1).square().mean() < 0.1  # at the end v = -x_0, here -1


def test_policy_is_trained_and_loads_in_plain_diffusers(tmp_path):
    pictures = draw("faces", 16, 0).pictures
    policies.train_policy(pictures, 2, seed=0, batch_size=4).save_pretrained(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.bin"))
    images = pipeline(2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 64, 64, 3)


def test_clip_is_trained_and_loads_in_plain_open_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_encoders, "RARE", 5)
    drawn = [draw(domain, 40, 0) for domain in DOMAINS]
    toy_encoders.train_clip(drawn, tmp_path, seed=0, n_steps=4)
    clip = encoders.load_clip(tmp_path)
    assert encoders.embed_images(clip, to_tensor(drawn[0].pictures)).shape == (40, 256)
    texts = ["an old person", "a young person"]
    assert encoders.embed_texts(clip, texts).shape == (2, 256)
    assert clip.tokenizer(["a zeppelin"])[0, 1] == 1  # an unknown word is unknown, no error


def test_age_classifier_is_trained_and_loads(tmp_path):
    drawn = draw("faces", 40, 0, age_balanced=1.0)
    toy_encoders.train_age_classifier(drawn, tmp_path, seed=0, n_steps=2)
    classifier = encoders.load_age_classifier(tmp_path)
    assert encoders.age_logits(classifier, to_tensor(drawn.pictures)).shape == (40, 9)


def test_regressor_learns_loads_and_knows_its_domains(tmp_path):
    drawn = [draw(domain, 60, 0) for domain in DOMAINS]
    regressor.train_regressor(drawn, tmp_path, seed=0, n_steps=2)
    loaded = regressor.load_regressor(tmp_path)
    for part in drawn:
        estimates = regressor.estimate(loaded, to_tensor(part.pictures), part.domain)
        assert list(estimates) == list(regressor.TARGETS[part.domain])
        assert {tuple(values.shape) for values in estimates.values()} == {(60,)}
        own = regressor.read(loaded, to_tensor(part.pictures), part.domain)
        for name, (mean, sd) in zip(own, loaded.scale[part.domain], strict=True):
            np.testing.assert_allclose(own[name], mean + sd * estimates[name].numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match="unknown domain 'cats'; the regressor knows faces"):
        regressor.estimate(loaded, torch.zeros(1, 3, 64, 64), "cats")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read as a regressor"):
        regressor.load_regressor(tmp_path)


def test_model_that_fails_to_build_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(folder):
        (folder / "half").touch()
        raise RuntimeError("out of luck")

    monkeypatch.setattr(make, "TOY", tmp_path)
    monkeypatch.setitem(make.BUILDERS, "age", fail)
    (tmp_path / "age").mkdir()
    (tmp_path / "age" / "old").touch()
    with pytest.raises(RuntimeError):
        make.build("age")
    assert [file.name for file in (tmp_path / "age").iterdir()] == ["old"]


# ------------------------------------------------------------------------------- what is shipped


def test_toy_world_is_small_and_safe():
    files = [file for file in paths.TOY.rglob("*") if file.is_file()]
    painter = paths.TOY / "text-to-image"
    own = [file.stat().st_size for file in files if file.is_relative_to(painter)]
    assert sum(own) <= 30e6
    assert sum(file.stat().st_size for file in files) - sum(own) <= 40e6
    assert {file.suffix for file in files} <= {".json", ".safetensors"}


@domains
def test_shipped_policy_is_small_and_linear(domain):
    pipeline = DDPMPipeline.from_pretrained(paths.TOY / domain)
    assert sum(p.numel() for p in pipeline.unet.parameters()) <= 2.5e6
    config = pipeline.scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule) == (1000, "linear")


def test_quality_is_what_was_asked_for():
    told = json.loads((paths.TOY / "quality.json").read_text())
    for domain in DOMAINS:
        own = told[domain]
        assert min(own["precision"], own["recall"]) >= 0.90
        assert min(own["eta1"]["precision"], own["eta1"]["recall"]) >= 0.85
        first = own["first_step"]
        assert first["correlation"] >= 0.4 and first["saturated"] <= 0.2
    for own in (told["faces"], told["faces"]["eta1"]):
        assert 0.04 <= own["share_50_or_over"] <= 0.09
    legible = ("smile", "glasses", "direct_gaze", "hair_length")
    assert min(told["faces"]["agreement"][name] for name in legible) >= 0.90
    accuracies = told["clip"]["balanced_accuracy"]
    assert len(accuracies) >= 8 and min(accuracies.values()) >= 0.90
    assert told["age"]["within_one_class"] >= 0.85 and told["age"]["auc_50"] >= 0.97
    assert told["aesthetic"]["pair_agreement"] >= 0.90


def test_quality_was_measured_on_the_shipped_encoders():
    told = json.loads((paths.TOY / "quality.json").read_text())
    clip = encoders.load_clip(paths.TOY / "clip")
    head = encoders.load_aesthetic_head(paths.TOY / "aesthetic")
    for domain in DOMAINS:
        drawn = draw(domain, quality.N_HELD_OUT, 7)
        with torch.no_grad():
            embeddings = encoders.embed_images(clip, to_tensor(drawn.pictures))
        now = quality.zero_shot_accuracy(clip, drawn, embeddings)
        for name, accuracy in now.items():
            then = told["clip"]["balanced_accuracy"][name]
            assert accuracy == pytest.approx(then, abs=0.005), name
        agreement = quality.pair_agreement(head, embeddings, drawn.taste)
        assert agreement == pytest.approx(told["aesthetic"][domain], abs=0.005)
