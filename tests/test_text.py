"""Text-to-image policies: context, guidance, adapters, prompts; on a tiny Stable Diffusion."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpo_lib import adapter, checkpoints, prompts, rewards, runs, sampler, settings
from ddpo_lib import finetune as loop
from ddpo_lib import policy as policies
from ddpo_lib.experience import Experience, corrupt, rescore
from ddpo_lib.objectives import hrf
from ddpo_lib.policy import predict_noise, transition

N_STEPS = 20
PROMPTS = ("a cat", "a dog, red", "a cow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, letter_tokenizer):
    """A StableDiffusionPipeline of 16x16 images with random weights, as diffusers writes it."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    home = tmp_path_factory.mktemp("sd")
    tokenizer = letter_tokenizer(home, model_max_length=16)
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    ))  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(  # as Stable Diffusion 1.x has it
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, skip_prk_steps=True,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(home / "pipeline")  # fmt: skip
    return home / "pipeline"


@pytest.fixture
def policy(folder):
    return policies.load(folder, device="cpu", bf16=False)


def pipeline(folder):
    """Plain diffusers, with DDIM's steps."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def redness(images, texts):
    """Likes red more where the prompt asks for it."""
    red = images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
    return red * torch.tensor([1.0 if "red" in text else -1.0 for text in texts])


def options(**changes):
    own = {
        "n_iterations": 2, "n_samples": 8, "minibatch_size": 4, "n_steps": 4, "n_development": 3,
        "learning_rate": 1e-2, "bf16": False, "prompts": PROMPTS, "adapter_rank": 2,
    }  # fmt: skip
    return settings.Finetune(**(own | changes))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampler_draws_what_the_pipeline_draws(folder, tmp_path, guidance, prediction, eta):
    """Stable Diffusion 2.1 predicts v. The noise of eta = 1 is the same, drawn by the pipeline."""
    own = tmp_path / "pipeline"
    shutil.copytree(folder, own)
    file = own / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": prediction}))
    policy = policies.load(own, device="cpu", bf16=False, guidance=guidance)
    context = policies.encode(policy, list(PROMPTS))
    # In float64, because a network of random weights blows up what is rounded.
    policy.unet.double()
    context = policies.Context(context.prompts, context.embeddings.double(), context.empty.double())
    x_T = sampler.noise(policy, sampler.seeds(0, 3)).double()
    states = []

    def keep(pipe, k, t, values):
        states.append(values["latents"].clone())
        return values

    pipeline(own).to(torch.float64)(
        list(PROMPTS), num_inference_steps=N_STEPS, guidance_scale=guidance, eta=eta,
        latents=x_T.clone(), output_type="latent", callback_on_step_end=keep,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    x, generator = x_T, torch.Generator().manual_seed(1)
    for k, (t, t_prev) in enumerate(zip(*policies.steps(policy, N_STEPS), strict=True)):
        with torch.no_grad():
            step = transition(policy, x, t.expand(3), t_prev.expand(3), eta, context)
        x = step.mean
        if eta:
            x = x + step.std.view(-1, 1, 1, 1) * torch.randn(
                x.shape, generator=generator, dtype=x.dtype
            )
        assert (x - states[k]).abs().max() < 1e-4 * states[k].abs().max(), k


def test_images_and_embeddings_are_the_pipelines(folder, policy):
    pipe = pipeline(folder)
    context = policies.encode(policy, list(PROMPTS))
    told, empty = pipe.encode_prompt(list(PROMPTS), "cpu", 1, True)
    assert torch.allclose(context.embeddings, told, atol=1e-6)
    assert torch.allclose(context.empty.expand(3, -1, -1), empty, atol=1e-6)
    latents = torch.randn(3, 4, 8, 8)
    theirs = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert torch.allclose(policies.decode(policy, latents), theirs, atol=1e-6)
    assert policy.image_shape == (4, 8, 8)


def test_ratios_are_one_before_the_first_step(folder):
    policy = policies.load(folder, device="cpu", bf16=False, guidance=4.0)
    context, seeds = policies.encode(policy, list(PROMPTS)), sampler.seeds(0, 3)
    x_T = sampler.noise(policy, seeds)
    trajectory = sampler.rollout(policy, x_T, N_STEPS, seeds, context=context, reduction="sum")
    step, sample = torch.cartesian_prod(torch.arange(N_STEPS - 1), torch.arange(3)).unbind(1)
    with torch.no_grad():
        again = rescore(policy, trajectory, step, sample)
    assert again.log_ratio.abs().max() < 1e-5 * trajectory.log_probs.abs().max()


def test_gradient_through_both_halves_is_the_finite_difference(folder):
    policy = policies.load(folder, device="cpu", bf16=False, guidance=4.0)
    adapter.add(policy.unet, 2, 4.0, seed=0)
    policy.unet.double()
    weights = [p for p in policy.unet.parameters() if p.requires_grad]
    with torch.no_grad():  # the outer matrices start at 0, where half the gradient is 0
        for p in weights:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    x_t, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([900, 300])
    context = policies.encode(policy, ["a cat", "a cow"])
    context = policies.Context(context.prompts, context.embeddings.double(), context.empty.double())

    def value():
        return predict_noise(policy, x_t, t, context).square().sum()

    gradients = torch.autograd.grad(value(), weights)
    assert any(g.abs().max() > 0 for g in gradients)
    for p, gradient in zip(weights, gradients, strict=True):
        i = int(gradient.abs().argmax())
        sides = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                p.view(-1)[i] += shift
                sides.append(value())
                p.view(-1)[i] -= shift
        difference = (sides[0] - sides[1]) / 2e-5
        assert torch.isclose(gradient.view(-1)[i], difference, rtol=1e-4, atol=1e-6)


def test_adapter_starts_at_no_change_and_is_the_only_thing_that_learns(folder, policy):
    context, x_t, t = policies.encode(policy, ["a cat"]), torch.randn(1, 4, 8, 8), torch.tensor([5])
    before = predict_noise(policy, x_t, t, context)
    adapter.add(policy.unet, 2, 4.0, seed=0)
    assert predict_noise(policy, x_t, t, context).equal(before)
    learned = {name for name, p in policy.unet.named_parameters() if p.requires_grad}
    assert learned
    assert all(".lora_" in name for name in learned)
    assert {name.split(".lora_")[0].rpartition("attn")[2][2:] for name in learned} == {
        "to_q", "to_k", "to_v", "to_out.0",
    }  # fmt: skip
    without = adapter.Without(policy.unet)
    assert not list(without.parameters())
    with torch.no_grad():
        next(p for n, p in policy.unet.named_parameters() if "lora_B" in n).add_(1)
    assert not predict_noise(policy, x_t, t, context).equal(before)
    off = policies.Policy(without, policy.scheduler, False, policy.text)
    assert off.unet(x_t, t, context.embeddings).sample.equal(
        policies.load(folder, device="cpu", bf16=False).unet(x_t, t, context.embeddings).sample
    )


@pytest.mark.parametrize("rank", [2, 0])
def test_finetuned_goes_on_to_the_bit_and_plain_diffusers_draws_it(folder, policy, tmp_path, rank):
    whole = loop.finetune(policy, redness, "ddpo", options(adapter_rank=rank), tmp_path / "whole")
    for n in (1, 2):
        broken = loop.finetune(
            policy, redness, "ddpo", options(adapter_rank=rank, n_iterations=n), tmp_path / "broken"
        )
    for file in sorted((whole / "last").rglob("*.safetensors")):
        one, two = load_file(file), load_file(broken / file.relative_to(whole))
        assert all(one[name].equal(two[name]) for name in one), file
    first, second = runs.metrics(whole)[1:]
    assert [len(row["prompts"]) for row in (first, second)] == [8, 8]
    assert first["prompts"] != second["prompts"]
    if rank:
        size = sum(file.stat().st_size for file in (whole / "last").rglob("*.safetensors"))
        assert size < 300_000  # the network alone has two million bytes

    best = policies.load(whole / "best", device="cpu", bf16=False, base=folder, guidance=3.0)
    x_T, told = sampler.noise(best, [1, 2]), ["a cat", "a dog, red"]
    ours = sampler.sample(best, x_T, N_STEPS, context=policies.encode(best, told))
    pipe = pipeline(folder if rank else whole / "best")
    if rank:
        pipe.load_lora_weights(whole / "best")
    theirs = pipe(
        told, latents=x_T.clone(), num_inference_steps=N_STEPS, guidance_scale=3.0,
        output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(ours, theirs, atol=1e-3)
    untouched = pipeline(folder)(
        told, latents=x_T.clone(), num_inference_steps=N_STEPS, guidance_scale=3.0,
        output_type="latent",
    ).images  # fmt: skip
    assert not torch.allclose(ours, untouched, atol=1e-2)


@pytest.mark.parametrize(
    "objective", ["ddpo", "rwr", "sft", "dpok", "d3po", "dense", "tdpo", "hrf", "nft", "promise"]
)
def test_every_method_takes_text(policy, tmp_path, objective):
    own = options(n_iterations=1, samples_per_prompt=4, adapter_rank=2)
    home = loop.finetune(policy, redness, objective, own, tmp_path / "run")
    assert runs.metrics(home)[1]["grad_norm"] > 0


def test_rewards_are_compared_among_the_samples_of_a_prompt(policy, tmp_path):
    """A reward that knows the prompt alone teaches nothing."""

    def length(images, texts):
        return torch.tensor([float(len(text)) for text in texts])

    home = loop.finetune(policy, length, "ddpo", options(n_iterations=1), tmp_path / "run")
    assert runs.metrics(home)[1]["grad_norm"] == 0


def test_prompts_take_turns_in_runs(policy):
    chosen = loop.prompts_of(options(), seed=0, iteration=1)
    assert not chosen.equal(loop.prompts_of(options(), seed=0, iteration=2))
    assert chosen.view(-1, 2).unique(dim=1).shape == (4, 1)
    counts = chosen.bincount(minlength=3)
    assert counts.max() - counts.min() <= 2
    assert loop.prompts_of(options(prompts=()), 0, 1) is None


@pytest.mark.parametrize(
    ("source", "slots", "expected"),
    [
        (["a cat", "a dog"], {}, ["a cat", "a dog"]),
        (
            "a(n) {animal} {does}",
            {"animal": ["cat", "ox"], "does": ["sits", "runs"]},
            ["a cat sits", "a cat runs", "an ox sits", "an ox runs"],
        ),
        ("{what}", {"what": ["one"]}, ["one"]),
    ],
)
def test_prompts_from_a_list_and_a_template(source, slots, expected):
    assert prompts.load(source, **slots) == expected


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  an ox \n")
    assert prompts.load(tmp_path / "p.txt") == ["a cat", "an ox"]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: prompts.load("a {cat}", dog=["x"]), ValueError, r"slots \['cat'\].*\['dog'\]"),
        (lambda: prompts.load([]), ValueError, "no prompts"),
        (lambda: prompts.load(["a", " "]), ValueError, "prompt 1, ' '"),
        (lambda: prompts.load(["a", "a"]), ValueError, "'a' comes twice"),
        (lambda: prompts.load("/nowhere"), FileNotFoundError, "/nowhere"),
        (lambda: options(prompts=["a", ""]), ValueError, "prompt ''"),
        (lambda: options(unseen_prompts=["a cow"]), ValueError, "'a cow' stands twice"),
        (lambda: options(samples_per_prompt=3), ValueError, "no multiple|not a multiple"),
        (lambda: options(samples_per_prompt=1), ValueError, "samples_per_prompt=1"),
        (lambda: options(prompts="a cat"), ValueError, "prompts='a cat'"),
    ],
)
def test_wrong_prompts_are_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_what_does_not_fit_is_refused_before_anything_is_written(
    policy, folder, new_policy, tmp_path
):
    home = tmp_path / "run"
    long = "a " * 20
    cases = [
        (policy, redness, options(prompts=()), "draws from text: give it prompts"),
        (policy, redness, options(prompts=(long,)), "has 22 tokens, the text encoder reads 16"),
        (policy, redness, options(unseen_prompts=(long,)), "has 22 tokens"),
        (new_policy(), rewards.jpeg_compressibility, options(), "takes no text"),
        (new_policy(), redness, options(prompts=(), adapter_rank=0), "reads prompts"),
        (
            new_policy(), rewards.jpeg_compressibility, options(prompts=()),
            "adapter_rank=2: the policy takes no text",
        ),
    ]  # fmt: skip
    for agent, reward, own, said in cases:
        with pytest.raises(ValueError, match=said):
            loop.finetune(agent, reward, "ddpo", own, home)
    with pytest.raises(ValueError, match="samples_per_prompt=2 is no multiple .*, 4"):
        loop.finetune(policy, redness, "hrf", options(), home)
    assert not home.exists()


@pytest.mark.parametrize("value", ["missing", torch.nan, torch.inf])
@pytest.mark.parametrize(
    "file, name",
    [
        ("text_encoder/model.safetensors", "final_layer_norm.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    ],
)
def test_text_encoder_and_decoder_must_be_whole(folder, tmp_path, file, name, value):
    own = shutil.copytree(folder, tmp_path / "pipeline")
    state = load_file(own / file)
    (key,) = (key for key in state if key.endswith(name))
    tensor = state.pop(key)
    if value != "missing":
        state[key] = torch.full_like(tensor, value)
    save_file(state, own / file, metadata={"format": "pt"})
    found = f"with other tensors, such as .*{name}" if value == "missing" else "'not all finite'"
    with pytest.raises(policies.Unsupported, match=found):
        policies.load(own, device="cpu")


def test_adapter_of_another_model_is_refused(folder, policy, new_policy, tmp_path):
    home = loop.finetune(policy, redness, "ddpo", options(n_iterations=1), tmp_path / "run")
    with pytest.raises(ValueError, match="holds weights alone: name the policy"):
        policies.load(home / "best")
    pixels = tmp_path / "pixels"
    policies.save(new_policy(), pixels)
    with pytest.raises(ValueError, match="is the adapter of a text-to-image policy"):
        policies.load(home / "best", base=pixels)
    weights = load_file(home / "best" / adapter.FILE)
    from safetensors.torch import save_file

    save_file({f"{k}.x": v for k, v in weights.items()}, home / "best" / adapter.FILE)
    with pytest.raises(ValueError, match="no adapter that fits .*, or it is damaged"):
        policies.load(home / "best", device="cpu", base=folder)
    other = policies.load(folder, device="cpu", bf16=False)
    adapter.add(other.unet, 4, 4.0, seed=0)
    with pytest.raises(ValueError, match="last is damaged"):
        checkpoints.restore_learner(home, other)


@pytest.mark.parametrize(
    "kind", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "DiTPipeline"]
)
def test_other_pipelines_are_refused_by_name(folder, tmp_path, kind):
    own = tmp_path / "pipeline"
    shutil.copytree(folder, own)
    index = json.loads((own / "model_index.json").read_text()) | {"_class_name": kind}
    (own / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        policies.Unsupported, match=f"'pipeline': '{kind}'.*StableDiffusionPipeline"
    ):
        policies.load(own)


def test_guidance_is_checked(folder, tmp_path, new_policy):
    for scale in (0.5, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="guidance="):
            policies.load(folder, guidance=scale)
    policies.save(new_policy(), tmp_path / "pixels")
    with pytest.raises(ValueError, match="takes no text, leave it at 1"):
        policies.load(tmp_path / "pixels", guidance=2.0)


def test_import_is_light():
    script = "import sys, ddpo_lib.finetune; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert not {"diffusers", "transformers", "peft"} & set(loaded.split())


def test_a_profile_runs_text_to_image_to_its_card(folder, tmp_path, monkeypatch):
    """Prompts by a template, an adapter, evaluation sets of trained and unseen prompts, the card's
    own code."""
    import re

    from ddpo_lib.book import finetuning, paths, profiles, results

    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paths, "CONFIG", tmp_path)
    toy = {name: str(paths.TOY / name) for name in profiles.MODELS}
    (tmp_path / "little.yaml").write_text(json.dumps({
        "policies": {"sd": str(folder)}, "models": toy,
        "evaluation": {"n": 4, "n_steps": 4},
        "finetune": {
            "n_iterations": 1, "n_samples": 4, "minibatch_size": 4, "n_steps": 4, "bf16": False,
            "n_development": 3, "adapter_rank": 2, "learning_rate": 1e-2, "guidance": 3.0,
            "prompts": {"template": "a {colour} cat", "colour": ["red", "blue"]},
            "unseen_prompts": ["a dog"],
        },
        "tasks": {"red": {"reward": f"{__name__}:redness"}},
    }))  # fmt: skip
    profile = profiles.load("little")
    run = profile.run("sd", "red")
    assert run.settings.prompts == ("a red cat", "a blue cat")
    monkeypatch.setattr(paths, "CONFIG", paths.ROOT / "config")
    home = finetuning.finetune(run)
    told = results.finish(profile, run)
    assert np.isfinite([told["eta0"]["effect_size"], told["eta1"]["vendi_ratio"]]).all()
    with monkeypatch.context() as patch:  # finish has drawn all sets
        patch.setattr(results.evaluation, "draw", None)
        seen, unseen = (results.sets(profile, run, 0.0, p) for p in (None, ("a dog",)))
        results.sets(profile, run, run.settings.eta, ("a dog",))
    assert not np.array_equal(seen[1], unseen[1])

    card = (home / "best/README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and str(folder) not in card
    monkeypatch.chdir(folder.parent)  # the card names a folder of this machine without its place
    code = re.search("```python\n(.*?)```", card, re.S)[1].replace("PATH OR ID OF THIS MODEL",
                                                                   str(home / "best"))  # fmt: skip
    space = {}
    exec(code.replace("num_images_per_prompt=4", "num_images_per_prompt=1"), space)
    assert len(space["images"]) == 1


def test_readmes_script_runs(folder, tmp_path, monkeypatch):
    """On small models, for one iteration."""
    import re

    from ddpo_lib.book import paths

    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search("```python\n(# cats.py.*?)```", readme, re.S)[1]
    short = "Finetune(n_iterations=1, n_steps=4, n_development=2, bf16=False, "
    changes = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(folder), "Finetune(": short,
        "ViT-L-14:openai": str(paths.TOY / "clip"), "runs/cats": str(tmp_path / "cats"),
        "riding a bike": "sits", "n_samples=64": "n_samples=8",
    }  # fmt: skip
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    assert (tmp_path / "cats/best" / adapter.FILE).exists()


def test_decisions_and_corruptions_keep_their_own_prompt(policy):
    """In whatever order: a row's sample, not its place, says which text it is of."""
    context, seeds = policies.encode(policy, list(PROMPTS)), sampler.seeds(0, 3)
    x_T = sampler.noise(policy, seeds)
    trajectory = sampler.rollout(policy, x_T, N_STEPS, seeds, context=context, reduction="sum")
    sample = torch.tensor([2, 2, 0, 1, 1])
    with torch.no_grad():
        again = rescore(policy, trajectory, torch.tensor([4, 9, 0, 7, 2]), sample)
    assert again.log_ratio.abs().max() < 1e-5 * trajectory.log_probs.abs().max()
    rows = torch.stack([torch.arange(5), sample, torch.arange(5)], dim=1)[:, None]
    told = corrupt(policy, Experience(trajectory, None, None), rows)[3]
    assert told.prompts == tuple(PROMPTS[i] for i in sample)
    assert told.embeddings.equal(context.embeddings[sample])


def test_hrf_parents_are_of_their_siblings_prompt(policy, monkeypatch):
    seen, roll_out = [], hrf.roll_out

    def note(*given, **rest):
        seen.append(given[3].prompts)
        return roll_out(*given, **rest)

    monkeypatch.setattr(hrf, "roll_out", note)
    context = policies.encode(policy, ["a cat"] * 4 + ["a cow"] * 4)
    asked = policy, hrf.Settings(), options(), None, sampler.seeds(0, 8), context
    hrf.rollout(*asked, 1, torch.Generator().manual_seed(0))
    assert seen == [("a cat", "a cow"), context.prompts]
