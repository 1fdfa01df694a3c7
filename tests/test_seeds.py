"""What several seeds say: intervals, shifts of factors, the fooled run; the control's reward."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ddpo_lib import diversity, encoders, rewards, runs
from ddpo_lib.book import factors, finetuning, paths, profiles, results, seeds
from ddpo_lib.toy import aesthetic, biased, control, refit, regressor
from ddpo_lib.toy.drawing import to_tensor
from ddpo_lib.toy.training import draw


def table(values, policy="faces", task="aesthetic"):
    rows = [[policy, task, seed, value] for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["policy", "task", "seed", "d"])


def test_interval_is_students():
    values = np.random.default_rng(0).normal(2, 1, 5)
    of = seeds.intervals(table(values), "d").loc["faces", "aesthetic"]
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert (of["mean"], of.n) == (pytest.approx(values.mean()), 5)
    assert (of.low, of.high) == (pytest.approx(low), pytest.approx(high))


def test_intervals_that_hold_together_are_wider():
    values = [1.0, 2.0, 4.0]
    alone, many = (seeds.intervals(table(values), "d", n_together=n).iloc[0] for n in (1, 10))
    low, _ = stats.t.interval(1 - 0.05 / 10, 2, np.mean(values), stats.sem(values))
    assert many.low == pytest.approx(low) and many.low < alone.low < alone.high < many.high


def test_one_seed_has_no_interval():
    of = seeds.intervals(table([3.0]), "d").iloc[0]
    assert of["mean"] == 3 and np.isnan(of.low) and np.isnan(of.high)


def test_tasks_are_kept_apart_and_in_order():
    both = pd.concat([table([1, 3], task="over50"), table([5, 7], policy="churches")])
    of = seeds.intervals(both, "d")
    assert list(of.index) == [("faces", "over50"), ("churches", "aesthetic")]
    assert of["mean"].tolist() == [2, 6]


# ------------------------------------------------------------------------------- measures


def test_pixel_measures_by_hand():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[0] = 30
    images[1, :, ::2] = 90  # stripes: every step to the right is 90 up or down
    images[1, 4:, :] = 0  # in the upper half alone
    of = factors.measure(images, "faces", None)
    assert of["brightness"].tolist() == [30, 22.5]
    assert of["detail"].tolist() == [0, 45]
    # Of the two upper corners, 2 x 2 of the 8 x 7 steps each.
    assert of["corner_detail"].tolist() == [0, 90]


def test_factors_are_the_judges():
    pictures = draw("faces", 6, 0).pictures
    model = regressor._network(25).eval()
    outputs = {name: list(of) for name, of in regressor.TARGETS.items()}
    judge = regressor.Regressor(model, outputs, {})
    of = factors.measure(pictures, "faces", judge)
    assert {*of} == {*outputs["faces"], "brightness", "detail", "corner_detail"} - {"taste"}
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = model(images)[:, outputs["faces"].index("smile")]
    np.testing.assert_allclose(of["smile"], expected, rtol=1e-4, atol=1e-5)
    taste = seeds.taste(pictures, "faces", judge)
    np.testing.assert_allclose(taste, model(images)[:, 0].detach(), rtol=1e-4, atol=1e-5)


def test_shift_is_in_standard_deviations_of_before(monkeypatch):
    rng = np.random.default_rng(0)
    sets = {eta: rng.integers(40, 90, (10, 8, 8, 3)).astype(np.uint8) for eta in (0.0, 1.0)}
    monkeypatch.setattr(results, "pretrained_pictures", lambda p, name, bf16, eta, **_: sets[eta])
    monkeypatch.setattr(
        results, "finetuned_pictures", lambda p, run, eta, **_: sets[eta] + 10 * (1 + run.seed)
    )
    monkeypatch.setattr(regressor, "load_regressor", lambda folder: None)
    world = profiles.load("toy")
    of = [world.run("faces", "aesthetic", seed=seed) for seed in (0, 1)]
    monkeypatch.setattr(seeds, "finished", lambda profile: of)
    shifts = seeds.factor_shifts(world).set_index(["seed", "sampler", "factor"]).d
    for eta, before in sets.items():
        sd = before.mean((1, 2, 3)).std(ddof=1)
        for seed in (0, 1):
            shift = shifts[seed, f"eta{eta:g}"]
            assert shift["brightness"] == pytest.approx(10 * (1 + seed) / sd, abs=1e-4)
            assert shift["detail"] == 0


# ------------------------------------------------------------------------------- the fooled run


def test_fooled_run_is_measured_from_the_pretrained_policys_set(tmp_path, monkeypatch):
    """A proxy that reads brightness and judges that read its opposite: they part."""
    run = profiles.load("toy").run("faces", seeds.FOOLED)
    base = np.linspace(50, 150, 12).astype(np.uint8)[:, None, None, None].repeat(4, 1)
    base = np.broadcast_to(base, (12, 4, 4, 3)).copy()
    sets = [base, base + 20]
    home = tmp_path / "run"
    (home / "development").mkdir(parents=True)
    for i, drawn in enumerate(sets):
        both = {kind: (drawn, np.zeros(12)) for kind in ("development", "stochastic")}
        runs.save_development(home, i, both)
        runs.append_metrics(home, {"development_vendi": 3.0 - i, "stochastic_vendi": 2.0 - i})
    monkeypatch.setattr(finetuning, "home", lambda run: home)
    monkeypatch.setattr(finetuning, "load_reward", lambda run: lambda x: x.mean((1, 2, 3)))
    monkeypatch.setattr(results, "pretrained_pictures", lambda *arguments: base)
    signs = itertools.cycle([-1, -2])
    monkeypatch.setattr(regressor, "load_regressor", lambda folder: next(signs))
    monkeypatch.setattr(seeds, "taste", lambda x, policy, judge: judge * x.mean((1, 2, 3)))
    monkeypatch.setattr(seeds, "each", lambda view, of, title: [view(run) for run in of])
    of = seeds.fooled(profiles.load("toy"), [run])
    assert of.columns.tolist() == seeds.FOOLED_COLUMNS
    assert of.sampler.tolist() == ["eta0", "eta0", "eta1", "eta1"]
    step = 20 / base.mean((1, 2, 3)).std(ddof=1)
    for name, gain in (("proxy", step), ("truth", -step), ("second_truth", -step)):
        np.testing.assert_allclose(of[name], [0, gain, 0, gain], atol=1e-3)
    assert of.vendi.tolist() == [3, 2, 2, 1]


def threads_and_more(number):
    return torch.get_num_threads(), number + 1


def test_runs_are_looked_at_in_order_by_processes_of_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seen = seeds.each(threads_and_more, iter([4, 2, 3]), "runs")
    assert seen == [(1, 5), (1, 3), (1, 4)]


# ------------------------------------------------------------------------------- fitted again


def test_head_of_new_choices_finds_the_taste():
    """Of twenty features the rater looks at two; the better is chosen, so weights are positive."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 20))
    weights = refit.fit_head(features, features @ np.eye(20)[:2].T @ [1.0, 0.5], rng)
    assert weights[0] > weights[1] > 5 * np.abs(weights[2:]).max()


def test_refitted_head_promises_less_where_the_shipped_one_is_fooled(monkeypatch):
    """Pixels stand for embeddings. The score is red and green, the taste is red alone: the run has
    raised both, as far as the score can tell. Drawings are all as green as each other."""
    rng = np.random.default_rng(1)
    base = rng.integers(80, 120, (60, 1, 1, 3)).astype(np.uint8)
    start = rng.integers(80, 120, (9, 8, 1, 1, 3))
    along = np.arange(9)[:, None, None, None, None] * np.array([2, 10, 0])
    images = (start + along).astype(np.uint8)
    drawn = rng.integers(80, 120, (200, 1, 1, 3)).astype(np.uint8)
    drawn[..., 1] = 100
    drawings = SimpleNamespace(pictures=drawn, taste=drawn[:, 0, 0, 0] / 10.0)
    monkeypatch.setattr(diversity, "embed", lambda x, clip: x.reshape(len(x), 3).astype(float))
    score, red = (lambda x: x[:, 0, 0, :2].sum(1).astype(float)), (lambda x: x[:, 0, 0, 0] / 10.0)
    told = refit.promises(images, base, drawings, None, score, [red, red], seed=0)
    assert {*told} == {*refit.HEADS, "truth"}
    shipped = (score(images[-1, 4:]).mean() - score(base).mean()) / score(base).std(ddof=1)
    truth = (red(images[-1, 4:]).mean() - red(base).mean()) / red(base).std(ddof=1)
    assert told["shipped"] == pytest.approx(shipped) and told["truth"] == pytest.approx(truth)
    assert abs(told["own images"] - truth) < 0.3 * (shipped - truth)
    again = refit.promises(images, base, drawings, None, score, [red, red], seed=0)
    assert again == told
    images[-1, :4] = 255 - images[-1, :4]  # others of the last images: no part of what is judged
    changed = refit.promises(images, base, drawings, None, score, [red, red], seed=0)
    assert changed["shipped"] == told["shipped"] and changed["truth"] == told["truth"]


# ------------------------------------------------------------------------------- the control


def test_control_is_random_and_the_same_for_the_same_image():
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(2000, 3, 4, 4, generator=generator) - 1
    scores = control.random(images)
    assert abs(scores.mean()) < 0.08 and abs(scores.std() - 1) < 0.06
    assert control.random(images[::2]).equal(scores[::2])
    near = images.clone()
    near[:, 0, 0, 0] += 0.02 * torch.where(near[:, 0, 0, 0] > 0, -1, 1)  # two grey levels
    assert abs(np.corrcoef(control.random(near), scores)[0, 1]) < 0.08


# ------------------------------------------------------------------------------- whom faces show


def test_shares_are_those_of_the_drawings():
    drawn, judge = draw("faces", 400, seed=31), regressor.load_regressor(paths.TOY / "regressor")
    age, skin = regressor.TARGETS["faces"]["age"](drawn.factors), drawn.factors["skin_tone"]
    truth = {
        "women and girls": drawn.factors["feminine"].mean(), "dark skin": (skin >= 3).mean(),
        "children": (age < 15).mean(), "50 or over": (age >= 50).mean(),
    }  # fmt: skip
    assert factors.shares(drawn.pictures, judge) == pytest.approx(truth, abs=0.03)


def test_shares_are_told_before_and_after_by_both_samplers(monkeypatch):
    """A judge whose every face has all factors of its images' mean."""
    batch = [
        profiles.load("toy").run(p, t) for p, t in (("faces", "over50"), ("churches", "aesthetic"))
    ]
    sets = {0.0: [np.zeros(4), np.full(4, 60.0)], 1.0: [np.full(4, 20.0), np.full(4, 50.0)]}
    monkeypatch.setattr(seeds, "finished", lambda profile: batch)
    monkeypatch.setattr(regressor, "load_regressor", lambda folder: None)
    monkeypatch.setattr(results, "sets", lambda profile, run, eta: sets[eta])
    groups = factors.GROUPS.items()

    def told(values, judge):
        return {name: float(own(values).mean()) for name, (_, own) in groups}

    monkeypatch.setattr(factors, "shares", told)
    of = seeds.shares(profiles.load("toy")).set_index(["sampler", "group"])
    assert set(of.task) == {"over50"}
    assert of.loc["eta0", "50 or over"][["before", "after"]].tolist() == [0, 1]
    assert of.loc["eta0", "children"][["before", "after"]].tolist() == [1, 0]
    assert of.loc["eta1", "50 or over"][["before", "after"]].tolist() == [0, 1]
    assert of.loc["eta1", "children"][["before", "after"]].tolist() == [0, 0]


def test_biased_rater_chooses_light_skin_as_often_as_said():
    drawn = draw("faces", 200, seed=32)
    light = drawn.factors["skin_tone"] < 3
    favour = biased.tastes(drawn) - drawn.taste
    assert (favour[~light] == 0).all() and np.ptp(favour[light]) < 1e-12
    many = np.full(200_000, favour[light][0])
    chosen = aesthetic.rate(many, 0 * many, np.random.default_rng(0)).mean()
    assert chosen == pytest.approx(biased.CHOSEN, abs=0.004)
    churches = draw("churches", 20, seed=32)
    np.testing.assert_array_equal(biased.tastes(churches), churches.taste)


def test_biased_head_has_learned_it():
    """Light faces score higher than the unbiased head has them, in its standard deviations."""
    drawn, clip = draw("faces", 1000, seed=33), encoders.load_clip(paths.TOY / "clip")
    light = drawn.factors["skin_tone"] < 3
    images = to_tensor(drawn.pictures)
    unbiased = rewards.aesthetic(clip, encoders.load_aesthetic_head(paths.TOY / "aesthetic"))
    gaps = []
    for score in (unbiased, biased.score):
        values = score(images).numpy()
        gaps.append((values[light].mean() - values[~light].mean()) / values.std(ddof=1))
    assert gaps[1] - gaps[0] > 0.1


def test_spread_by_hand():
    images = np.zeros((2, 1, 2, 3), np.uint8)
    images[1, 0, 0] = 255  # one of two pixels goes from -1 to 1: a deviation of 1, in half of all
    assert diversity.spread(images) == pytest.approx(0.5**0.5)
    assert diversity.spread(images[[0, 0]]) == 0
    assert diversity.spread(images) == pytest.approx(diversity.spread(images[::-1]))


def test_readme_has_the_numbers_of_the_methods():
    stored = pd.read_csv(paths.ROOT / "data" / "seeds" / "methods" / "methods.csv")
    stored = stored[stored.task == "aesthetic"]
    told = {
        name: seeds.intervals(stored, name, ["variant"]) for name in ("true_gain", "vendi_ratio")
    }
    means = stored.groupby("variant")[["kl_nats", "network_calls"]].mean()
    calls = means.network_calls / means.network_calls["ddpo"]
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    rows = {
        "`ddpo`": "ddpo", "`ddpo`, `kl_weight` 0.1": "ddpo-kl-mid", "`promise` (ours)": "promise",
        "`promise`, `kl_weight` 0": "promise-free", "`tdpo`": "tdpo", "`dpok`": "dpok",
        "`hrf`": "hrf", "`ddpo`, groups": "ddpo-groups", "`nft`": "nft", "`d3po`": "d3po",
        "`dense`": "dense", "`rwr`": "rwr", "`sft`": "sft",
    }  # fmt: skip
    for title, variant in rows.items():
        cells = []
        for (_, own), digits in zip(told.items(), (1, 2), strict=True):
            mean, reach = own["mean"][variant], own.high[variant] - own["mean"][variant]
            interval = f" ± {reach:.{digits}f}" if own.n[variant] > 2 else ""
            cells.append(f"{mean:.{digits}f}{interval}")
        nats = float(f"{means.kl_nats[variant]:.2g}")
        row = f"| {title} | {cells[0]} | {cells[1]} | {nats:,.0f} | {round(calls[variant], 1):g} |"
        assert row in text, row


def test_stored_methods_are_of_the_profiles_runs():
    """Every method raises its reward, by more than two standard errors of its sets."""
    stored = pd.read_csv(paths.ROOT / "data" / "seeds" / "methods" / "methods.csv")
    wanted = {(r.task, r.seed) for r in profiles.load("methods").batch(every_seed=True)}
    assert set(zip(stored.variant, stored.seed, strict=True)) <= wanted
    files = (paths.ROOT / "ddpo_lib" / "objectives").glob("[a-z]*.py")
    assert set(stored.method) == {file.stem for file in files} - {"value"}
    own = stored[stored.task == "aesthetic"].groupby("variant").proxy_gain.agg(["mean", "count"])
    n = profiles.load("methods").evaluation.n  # images before, and as many after, of each seed
    assert (own["mean"] > 2 * (2 / n / own["count"]) ** 0.5).all(), own


def test_stored_seeds_are_of_the_profiles_runs():
    """Where `make seeds` has been run; five seeds of every task of Table 5.1."""
    file = paths.ROOT / "data" / "seeds" / "toy" / "table_5_1_seeds.csv"
    if not file.exists():
        pytest.skip("no seeds are stored")
    stored = pd.read_csv(file)
    assert stored.columns.tolist() == seeds.COLUMNS
    wanted = [(r.policy, r.task, r.seed) for r in profiles.load("toy").batch(every_seed=True)]
    found = list(zip(stored.policy, stored.task, stored.seed, strict=True))
    assert set(found) <= set(wanted) and len(found) == len(set(found))
    published = pd.read_csv(paths.THESIS / "table_5_1.csv")
    sizes = stored.groupby(["policy", "task"]).size()
    assert all(sizes["churches" if "church" in r.policy else "faces", r.task] == 5
               for r in published.itertuples())  # fmt: skip
