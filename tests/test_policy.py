"""The transition against diffusers' own DDIM step; loading and saving."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.testing import assert_close

from ddpo_lib import policy as policies
from ddpo_lib.policy import Policy, predict_noise, timesteps, transition


class FixedNoise:
    """In the network's place: predicts the noise that it was given."""

    device = torch.device("cpu")

    def __init__(self, eps):
        self.eps = eps

    def __call__(self, x_t, t):
        return SimpleNamespace(sample=self.eps)


def setting(n_steps, clip_sample=True):
    """Every step of a schedule at once: policy, diffusers' scheduler, x_t, t, t_prev and noise."""
    scheduler = DDPMScheduler(1000, clip_sample=clip_sample)
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(n_steps)
    random = torch.randn(3, n_steps, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t, eps, z = random
    policy = Policy(FixedNoise(eps), scheduler, bf16=False)
    t = ddim.timesteps
    return policy, ddim, x_t, t, torch.cat([t[1:], torch.tensor([-1])]), z


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n_steps", [40, 20])
def test_transition_is_diffusers_ddim_step_at_every_step(n_steps, eta, clip_sample):
    policy, ddim, x_t, t, t_prev, z = setting(n_steps, clip_sample)
    eps = policy.unet.eps

    ours = transition(policy, x_t, t, t_prev, eta)

    for i in range(n_steps):
        one = slice(i, i + 1)

        def step(noise, one=one, i=i):
            return ddim.step(eps[one], t[i], x_t[one], eta=eta, variance_noise=noise)

        mean, sampled = step(torch.zeros_like(z[one])), step(z[one])
        assert_close(ours.mean[one], mean.prev_sample, rtol=1e-5, atol=1e-6)
        assert_close(ours.denoised[one], mean.pred_original_sample, rtol=1e-5, atol=1e-6)
        drawn = ours.mean[one] + ours.std[i] * z[one]
        assert_close(drawn, sampled.prev_sample, rtol=1e-5, atol=1e-6)
    assert ours.std[-1] == 0
    assert (ours.std[:-1] > 0).all() == (eta > 0)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_transition_passes_the_gradient_that_diffusers_step_passes(eta):
    """Saturated pixels pass none through the clamped picture, all pixels pass the direct term."""
    policy, ddim, x_t, t, t_prev, weight = setting(20)
    eps = policy.unet.eps.requires_grad_()

    (transition(policy, x_t, t, t_prev, eta).mean * weight).sum().backward()
    ours, eps.grad = eps.grad, None
    for i in range(20):
        one = slice(i, i + 1)
        nothing = torch.zeros_like(x_t[one])
        step = ddim.step(eps[one], t[i], x_t[one], eta=eta, variance_noise=nothing)
        (step.prev_sample * weight[one]).sum().backward()

    assert_close(ours, eps.grad, rtol=1e-4, atol=1e-6)
    saturated = transition(policy, x_t, t, t_prev, eta).denoised.abs() == 1
    assert 0.1 < saturated.float().mean() < 0.9


def test_mixed_timesteps_equal_one_by_one(policy):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(12, 3, 8, 8, generator=generator)
    t = torch.randint(0, 1000, (12,), generator=generator)
    t_prev = t - 50

    mixed = transition(policy, x_t, t, t_prev)

    for i in range(12):
        one = slice(i, i + 1)
        alone = transition(policy, x_t[one], t[one], t_prev[one])
        assert_close(mixed.mean[one], alone.mean, rtol=1e-5, atol=1e-5)
        assert_close(mixed.denoised[one], alone.denoised, rtol=1e-5, atol=1e-5)
        assert_close(mixed.std[one], alone.std)


def test_network_sees_its_own_timestep(policy):
    x_t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0, 500, 999])
    assert_close(predict_noise(policy, x_t, t), policy.unet(x_t, t).sample)
    other = predict_noise(policy, x_t, t + torch.tensor([50, -50, -50]))
    assert ((other - predict_noise(policy, x_t, t)).abs().amax((1, 2, 3)) > 1e-3).all()


def test_bf16_runs_the_network_only(new_policy):
    x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([975, 500])
    half, full = (transition(new_policy(bf16=on), x_t, t, t - 25) for on in (True, False))
    assert predict_noise(new_policy(bf16=True), x_t, t).dtype == torch.float32
    assert half.mean.dtype == half.std.dtype == half.denoised.dtype == torch.float32
    assert not half.mean.equal(full.mean)
    assert_close(half.mean, full.mean, rtol=0.02, atol=0.02)
    assert half.std.equal(full.std)


@pytest.mark.parametrize("n_steps", [1, 20, 30, 40, 999, 1000])
def test_timesteps_are_diffusers_ddim_timesteps(policy, n_steps):
    ddim = DDIMScheduler.from_config(policy.scheduler.config)
    ddim.set_timesteps(n_steps)
    assert timesteps(policy, n_steps).equal(ddim.timesteps)


@pytest.mark.parametrize("n_steps", [0, 1001])
def test_impossible_number_of_steps_is_an_error(policy, n_steps):
    with pytest.raises(ValueError, match=f"n_steps={n_steps}: must lie between 1 and .* 1000"):
        timesteps(policy, n_steps)


def test_image_shape(policy, new_policy):
    assert policy.image_shape == (3, 8, 8)
    assert new_policy(channels=1).image_shape == (1, 8, 8)


def test_saved_policy_loads_here_and_in_plain_diffusers(new_policy, tmp_path):
    policy = new_policy(seed=5, clip_sample=False)
    policies.save(policy, tmp_path / "p")

    ours = policies.load(tmp_path / "p", device="cpu", bf16=False)
    theirs = DDPMPipeline.from_pretrained(tmp_path / "p")

    for unet in (ours.unet, theirs.unet):
        for name, value in policy.unet.state_dict().items():
            assert unet.state_dict()[name].equal(value), name
    for scheduler in (ours.scheduler, theirs.scheduler):
        assert scheduler.alphas_cumprod.equal(policy.alpha_bar)
        assert scheduler.config.clip_sample is False
    assert not ours.unet.training
    assert not ours.bf16
    assert (tmp_path / "p/unet/diffusion_pytorch_model.safetensors").exists()


def test_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        policies.load(tmp_path / "nothing")


def test_unreachable_hub_id_is_one_clear_error():
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing'.*id of a model on the Hugging"):
        policies.load("nobody/nothing")


@pytest.mark.parametrize("damage", ["truncated", "empty", "removed", "no index", "no scheduler"])
def test_incomplete_folder_is_one_clear_error(policy, tmp_path, damage):
    policies.save(policy, tmp_path / "p")
    weights = tmp_path / "p/unet/diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "removed":
        weights.unlink()
    elif damage == "no index":
        (tmp_path / "p/model_index.json").unlink()
    else:
        (tmp_path / "p/scheduler/scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cannot load a policy from .*Cause: \w+"):
        policies.load(tmp_path / "p")


@pytest.mark.parametrize(
    "config",
    [{"prediction_type": "v_prediction"}, {"clip_sample_range": 2.0}, {"thresholding": True}],
)
def test_other_kind_of_model_is_one_clear_error(policy, tmp_path, config):
    policies.save(Policy(policy.unet, DDPMScheduler(1000, **config)), tmp_path / "p")
    with pytest.raises(ValueError, match="only models that predict the noise"):
        policies.load(tmp_path / "p")


def test_model_with_a_learned_variance_is_one_clear_error(policy, tmp_path):
    config = dict(policy.unet.config) | {"out_channels": 6}
    policies.save(Policy(UNet2DModel.from_config(config), policy.scheduler), tmp_path / "p")
    with pytest.raises(ValueError, match="'learned variance': True"):
        policies.load(tmp_path / "p")


def test_a_long_leap_to_the_end_of_the_chain_is_finite(policy):
    """At eta = 1 nothing is left for the direction term there, and rounding makes it less."""
    t, t_prev = torch.arange(800, 1000).repeat(3), torch.arange(3).repeat_interleave(200)
    x_t = torch.zeros(len(t), 3, 2, 2)
    fixed = Policy(FixedNoise(torch.ones_like(x_t)), policy.scheduler, bf16=False)
    assert transition(fixed, x_t, t, t_prev).mean.isfinite().all()


# ------------------------------------------------------------------------------- other formats


def same_weights(unet, state):
    return all(unet.state_dict()[name].equal(value) for name, value in state.items())


@pytest.fixture
def with_attention():
    """A network with the blocks, the config and the fields of google/ddpm-*, but tiny."""
    torch.manual_seed(7)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    ).eval()


def write_old_layout(folder, unet):
    """As on the Hub since 2022: all files at the root, a pickle, the attention's former names."""
    folder.mkdir()
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
    former |= {".to_out.0.": ".proj_attn."}
    state = {}
    for name, value in unet.state_dict().items():
        for now, then in former.items():
            name = name.replace(now, then)
        state[name] = value
    assert any("proj_attn" in name for name in state)
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    later = {"add_attention", "attn_norm_num_groups", "class_embed_type", "downsample_type"}
    later |= {"dropout", "mid_block_type", "num_class_embeds", "num_train_timesteps"}
    later |= {"time_embedding_dim", "upsample_type"}
    config = {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"}
    config |= {name: v for name, v in unet.config.items() if name[0] != "_" and name not in later}
    schedule = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02}
    schedule |= {"beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True}
    schedule |= {"num_train_timesteps": 1000, "trained_betas": None, "variance_type": "fixed_small"}
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.0.4"}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    for name, content in (
        ("config", config), ("scheduler_config", schedule), ("model_index", index),
    ):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_older_layout_loads(with_attention, tmp_path, capfd):
    write_old_layout(tmp_path / "old", with_attention)
    loaded = policies.load(tmp_path / "old", "cpu", bf16=False)
    assert same_weights(loaded.unet, with_attention.state_dict())
    assert loaded.alpha_bar.equal(DDPMScheduler(1000).alphas_cumprod)
    assert loaded.scheduler.config.clip_sample
    assert timesteps(loaded, 40).tolist() == list(range(975, -1, -25))
    x_t, t = torch.zeros(1, 3, 8, 8), torch.tensor([500])
    torch.testing.assert_close(predict_noise(loaded, x_t, t), with_attention(x_t, t).sample)
    assert "unsafe" not in "".join(capfd.readouterr())

    policies.save(loaded, tmp_path / "new")
    again = DDPMPipeline.from_pretrained(tmp_path / "new", use_safetensors=True)
    assert same_weights(again.unet, with_attention.state_dict())


def test_of_a_pickle_and_safetensors_the_latter_is_read(policy, new_policy, tmp_path):
    policies.save(policy, tmp_path / "both")
    torch.save(
        new_policy(seed=4).unet.state_dict(), tmp_path / "both/unet/diffusion_pytorch_model.bin"
    )
    assert same_weights(policies.load(tmp_path / "both", "cpu").unet, policy.unet.state_dict())


class Attack:
    """A pickle that would write a file if it were trusted."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_pickles_are_not_trusted(with_attention, tmp_path):
    write_old_layout(tmp_path / "old", with_attention)
    state = {"x": Attack(tmp_path / "trap")}
    torch.save(state, tmp_path / "old" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="cannot load a policy from"):
        policies.load(tmp_path / "old")
    torch.save({"model_state_dict": state}, tmp_path / "mine.pth")
    policies.save(Policy(with_attention, DDPMScheduler(1000)), tmp_path / "base")
    with pytest.raises(ValueError, match="no checkpoint of the thesis's code"):
        policies.load(tmp_path / "mine.pth", base=tmp_path / "base")
    assert not (tmp_path / "trap").exists()


def test_ddim_pipeline_loads_and_is_saved_for_ddpm(policy, tmp_path):
    scheduler = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=False)
    DDIMPipeline(policy.unet, scheduler).save_pretrained(tmp_path / "ddim")
    loaded = policies.load(tmp_path / "ddim", "cpu", bf16=False)
    assert same_weights(loaded.unet, policy.unet.state_dict())
    assert loaded.alpha_bar.equal(scheduler.alphas_cumprod)
    assert loaded.scheduler.config.clip_sample is False

    policies.save(loaded, tmp_path / "ddpm")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "ddpm")
    assert isinstance(pipeline.scheduler, DDPMScheduler)
    assert pipeline.scheduler.alphas_cumprod.equal(scheduler.alphas_cumprod)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, num_inference_steps=3, output_type="np").images
    assert drawn.shape == (2, 8, 8, 3) and np.isfinite(drawn).all()


@pytest.fixture
def checkpoint(policy, new_policy, tmp_path):
    """What the thesis's code saves: a finetuned network's weights, both optimizers, a reward."""
    finetuned = new_policy(seed=9)
    optimizer = torch.optim.AdamW(finetuned.unet.parameters())
    content = {
        "model_state_dict": finetuned.unet.state_dict(),
        "policy_optimizer_state_dict": optimizer.state_dict(),
        "value_optimizer_state_dict": optimizer.state_dict(),
        "best_reward": np.float64(5.58),
    }
    torch.save(content, tmp_path / "task-ckpt.pth")
    policies.save(policy, tmp_path / "base")
    return tmp_path / "task-ckpt.pth"


def test_checkpoint_of_the_thesis_code_loads_into_its_base(checkpoint, new_policy, tmp_path):
    loaded = policies.load(checkpoint, "cpu", base=tmp_path / "base")
    assert same_weights(loaded.unet, new_policy(seed=9).unet.state_dict())
    policies.save(loaded, tmp_path / "folder")
    folder = DDPMPipeline.from_pretrained(tmp_path / "folder")
    assert same_weights(folder.unet, new_policy(seed=9).unet.state_dict())


def test_checkpoint_written_under_numpy_1_loads(checkpoint, new_policy, tmp_path):
    """There the scalar's module had another name, which the archive's pickle holds as text."""
    import zipfile

    old = tmp_path / "old.pth"
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(old, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(entry.filename, content)
    loaded = policies.load(old, "cpu", base=tmp_path / "base")
    assert same_weights(loaded.unet, new_policy(seed=9).unet.state_dict())


def test_checkpoint_without_a_base_says_how_to_name_it(checkpoint):
    with pytest.raises(ValueError, match="weights alone: name the policy.*base='google/ddpm"):
        policies.load(checkpoint)


def test_checkpoint_of_another_network_or_file_is_one_clear_error(checkpoint, new_policy, tmp_path):
    policies.save(new_policy(widths=(8,)), tmp_path / "other")
    with pytest.raises(ValueError, match="no checkpoint of the thesis's code.*its base is another"):
        policies.load(checkpoint, base=tmp_path / "other")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="or it is damaged"):
        policies.load(checkpoint, base=tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="no policy at .*nothing.pth"):
        policies.load(tmp_path / "nothing.pth", base=tmp_path / "base")
