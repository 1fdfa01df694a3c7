"""The toy Stable Diffusion, and the tables of the text-to-image chapter."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from ddpo_lib import encoders, evaluation, policy, rewards, runs, sampler
from ddpo_lib.book import finetuning, paths, profiles, results, seeds, text
from ddpo_lib.toy import alignment, text_quality, training

FOLDER = paths.TOY / "text-to-image"


def test_quality_of_the_toy_stable_diffusion():
    told = json.loads((paths.TOY / "quality.json").read_text(encoding="utf-8"))["text"]
    usual, free = (told[f"guidance_{g:g}"] for g in (text_quality.GUIDANCE, 1.0))
    shares = {name: share for own in usual.values() for name, share in own["shown"].items()}
    assert len(shares) >= 12 and sum(share >= 0.85 for share in shares.values()) >= 10
    assert told["psnr_db"] >= 28
    for domain, own in usual.items():
        assert min(own["precision"], own["recall"]) >= 0.8
        mean = [np.mean(list(each[domain]["shown"].values())) for each in (free, usual)]
        assert mean[0] < mean[1]


def test_shown_is_counted_over_the_captions_that_say_it(monkeypatch):
    captions = ("a person, smiling",) * 10 + ("a person, serious",) * 12 + ("an old person",) * 9
    smile = torch.tensor([1.0] * 7 + [0.0] * 3 + [1.0] * 12 + [0.0] * 9)
    seen = {"smile": smile, "age": torch.zeros(31)}
    monkeypatch.setattr(text_quality, "read", lambda judge, images, domain: seen)
    pictures = np.zeros((31, 64, 64, 3), np.uint8)
    told = text_quality.shown(pictures, captions, "faces", None)
    assert told == pytest.approx({"smiling": 0.7, "serious": 0.0})  # too few say "old"


@pytest.mark.parametrize(
    ("prompt", "new"),
    [
        ("a baby with a beard", "nothing"),
        ("a girl with a beard", "pair"),
        ("an old woman with a beard", "subject"),
        ("a baby with long hair", "attribute"),
        ("an old woman with long hair", "both"),
    ],
)
def test_what_is_new_in_a_prompt(prompt, new):
    assert text.new_in(prompt, ("a baby with a beard", "a girl with glasses")) == new


@pytest.fixture(scope="module")
def small():
    """Profile text with one short task, whose reward is easy to raise."""
    profile = profiles.load("text")
    tasks = {"many-ddpo": profile.tasks["many-ddpo"] | {"reward": lambda x: x.mean((1, 2, 3))}}
    short = {"n_iterations": 3, "n_samples": 4, "minibatch_size": 2, "n_steps": 3}
    short |= {"n_development": 2, "samples_per_prompt": 2, "learning_rate": 1e-2, "bf16": False}
    return dataclasses.replace(
        profile,
        evaluation=profiles.Evaluation(n=24, n_steps=3),
        tasks=tasks,
        finetune=profile.finetune | short,
        runs=[{"policy": "painter", "task": "many-ddpo"}],
    )


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        (run,) = small.batch()
        finetuning.finetune(run)
        results.finish(small, run)
        yield run


def test_tables(small, run):
    made = text.tables(small)
    table, by_prompt = made["text"], made["by_prompt"]
    assert table.columns.tolist() == text.COLUMNS
    assert set(zip(table.sampler, table.split, strict=True)) == {
        (sampler, split) for sampler in ("eta0", "eta1") for split in ("trained", "unseen")
    }
    assert table.prompts.unique().tolist() == ["many"] and set(table.method) == {"ddpo"}
    row = table[(table.sampler == "eta1") & (table.split == "unseen")].iloc[0]
    unseen = run.settings.unseen_prompts
    both = results.sets(small, run, run.settings.eta, unseen)
    for end, pictures in (("_base", both[0]), ("", both[1])):
        for name, judge in (("alignment", alignment.reward), ("true", alignment.truth)):
            told = evaluation.score(pictures, judge, prompts=unseen)
            assert row[name + end] == pytest.approx(told.mean(), abs=1e-4)
    assert (both[0] != both[1]).any()
    # The prompts' means, weighted by their images, are the splits'.
    weighted = by_prompt.assign(total=by_prompt.true * by_prompt.n)
    sums = weighted.groupby(["sampler", "split"])[["total", "n"]].sum()
    means = table.set_index(["sampler", "split"]).true
    pd.testing.assert_series_equal(
        (sums.total / sums.n).sort_index(), means.sort_index(), check_names=False, atol=2e-4
    )
    assert set(by_prompt[by_prompt.split == "trained"].new) == {"nothing"}
    whole = by_prompt[(by_prompt.sampler == "eta1") & (by_prompt.split == "unseen")].whole
    shown = evaluation.score(both[1], alignment.truth, prompts=unseen) == 1
    each = [shown[i :: len(unseen)].mean() for i in range(len(unseen))]
    assert max(each) > 0 and whole.tolist() == pytest.approx(each, abs=1e-4)
    assert len(made["images"]["many-ddpo unseen"]) == text.N_SHOWN


def test_astray_are_churches_for_people_and_people_for_churches():
    drawn = [training.draw(domain, 8, seed=3).pictures for domain in ("faces", "churches")]
    pictures = np.stack(drawn, axis=1).reshape(16, 64, 64, 3)  # by turns, as prompts are
    prompts = ("a person with glasses", "a church at night")
    clip = encoders.load_clip(paths.TOY / "clip")
    whole = {"true": lambda pictures, prompts: np.ones(len(pictures))}
    assert text._view(pictures, prompts, whole, clip)[0].astray.tolist() == [0] * 16
    assert text._view(pictures, prompts[::-1], whole, clip)[0].astray.tolist() == [1] * 16


def test_along(small, run):
    curves = text.along(small, seeds.finished(small))
    assert curves.groupby("sampler").iteration.agg(list).tolist() == [[*range(4)]] * 2
    drawn = runs.development(finetuning.home(run), "stochastic")[0][1]
    told = evaluation.score(drawn, alignment.truth, prompts=run.settings.prompts)
    row = curves[(curves.sampler == "eta1") & (curves.iteration == 1)].iloc[0]
    assert row.true == pytest.approx(told.mean(), abs=1e-4)


def test_plain_diffusers_draws_the_same_and_scores_the_same(run):
    """Without the library: the folder, and the adapter that finetuning left."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    prompts, n_steps = list(run.settings.prompts[:6]), 20
    home = finetuning.home(run)
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for adapter in (None, home / "best"):
        if adapter:
            pipeline.load_lora_weights(adapter)
        options = {"bf16": False, "guidance": run.guidance}
        ours = policy.load(adapter or FOLDER, base=FOLDER if adapter else None, **options)
        x_T = sampler.noise(ours, sampler.seeds(3, len(prompts)))
        with torch.no_grad():
            images = policy.decode(
                ours, sampler.sample(ours, x_T, n_steps, context=policy.encode(ours, prompts))
            )
        theirs = pipeline(
            prompts, latents=x_T, num_inference_steps=n_steps, guidance_scale=run.guidance,
            output_type="np",
        ).images  # fmt: skip
        seen = rewards.to_uint8(torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1)
        mine = rewards.to_uint8(images)
        assert (seen.int() - mine.int()).abs().max() <= 2
        both = [
            evaluation.score(each.numpy(), alignment.truth, prompts=prompts)
            for each in (seen, mine)
        ]
        assert both[0].mean() == pytest.approx(both[1].mean(), abs=1e-3)
