"""A policy: a denoiser with its noise schedule, and the transition p_theta(x_{t-1} | x_t)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpo_lib import hub

SUPPORTED = {"prediction_type": "epsilon", "clip_sample_range": 1, "thresholding": False}


@dataclass(frozen=True)
class Policy:
    """A pixel-space diffusion model seen as a stochastic policy over denoising steps."""

    unet: UNet2DModel
    """eps_theta: takes x_t (N, C, H, W) and t (N,), predicts the noise in x_t."""
    scheduler: DDPMScheduler
    """Came with the weights; only its `alphas_cumprod` and `clip_sample` count."""
    bf16: bool = True
    """Run the network under bfloat16 autocast. Everything after the network is float32."""

    @property
    def alpha_bar(self) -> torch.Tensor:
        """(T,) float32: the cumulative product of 1 - beta_t (equation 2.7)."""
        return self.scheduler.alphas_cumprod

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures that the network draws."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width


@dataclass(frozen=True)
class Transition:
    """The Gaussian p_theta(x_{t-1} | x_t) = N(mean, std^2 I) and what it was made from."""

    mean: torch.Tensor
    """(N, C, H, W) float32."""
    std: torch.Tensor
    """(N,) float32: sigma_t; 0 where the step is deterministic."""
    denoised: torch.Tensor
    """(N, C, H, W) float32: the clean picture x~_0 predicted from x_t (equation 2.25)."""


def load(
    source: str | Path, device: str | None = None, bf16: bool = True, base: str | Path | None = None
) -> Policy:
    """Load a policy.

    Args:
        source: the id of a model on the Hub, "google/ddpm-church-256", with a commit, tag or branch
            after an @ if it is not to be the newest; or a folder of a `DDPMPipeline` or
            `DDIMPipeline`, also of the older layout with every file at its root; or a .pth file
            that the thesis's code wrote.
        device: "cpu", "cuda", …; by default a GPU if there is one.
        bf16: run the network under bfloat16 autocast; a GPU without bfloat16, such as a T4, runs it
            in float32 all the same.
        base: source of the policy that a .pth file was finetuned from: such a file has weights
            alone, and neither the network's layout nor its schedule.

    Raises:
        FileNotFoundError: the folder or file is missing, incomplete or truncated, or the Hub gave
            nothing; says what to do.
        ValueError: the model is of a kind that this library does not finetune, or the weights of a
            .pth file are another network's.
    """
    source = str(source)
    if source.endswith(".pth"):
        pipeline = _pipeline(_base_of(source, base))
        _load_weights(pipeline.unet, source)
    else:
        pipeline = _pipeline(source)
    found = {name: pipeline.scheduler.config.get(name) for name in SUPPORTED}
    found["learned variance"] = (
        pipeline.unet.config.out_channels != pipeline.unet.config.in_channels
    )
    if found != SUPPORTED | {"learned variance": False}:
        raise ValueError(
            f"{source}: only models that predict the noise alone and clip samples at 1 are "
            f"supported, {SUPPORTED}, not {found}"
        )
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, DDPMScheduler):  # a DDIMPipeline's: other steps, the same noise
        scheduler = DDPMScheduler.from_config(scheduler.config)
    unet = pipeline.unet.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    if unet.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        bf16 = False
    return Policy(unet.to(memory_format=torch.channels_last), scheduler, bf16)


def _pipeline(source: str) -> DDPMPipeline:
    if hub.locate(source) is None and not Path(source).is_dir():
        raise FileNotFoundError(f"no policy at {source!r}: the folder does not exist")
    folder = hub.fetch("policy", source)
    # Left to itself, diffusers calls a .bin file unsafe, which it nonetheless reads weights-only.
    safetensors = any(folder.rglob("diffusion_pytorch_model*.safetensors"))
    try:
        return DDPMPipeline.from_pretrained(folder, use_safetensors=safetensors)
    except Exception as error:
        raise FileNotFoundError(
            f"cannot load a policy from {source!r}. It must be a complete folder of a DDPMPipeline "
            "or DDIMPipeline (model_index.json, and unet/ and scheduler/ or their files beside it) "
            "or the id of such a model on the Hugging Face Hub. "
            f"Cause: {hub.cause(error)}"
        ) from error


def _base_of(file: str, base: str | Path | None) -> str:
    if not Path(file).is_file():
        raise FileNotFoundError(f"no policy at {file!r}: the file does not exist")
    if base is None:
        raise ValueError(
            f"{file} holds weights alone: name the policy that it was finetuned from too, "
            "policy.load(file, base='google/ddpm-celebahq-256'). policy.save then makes a folder "
            "of it, which a profile can name"
        )
    return str(base)


def _load_weights(unet: UNet2DModel, file: str) -> None:
    """Put the `model_state_dict` of the thesis's code into the network."""
    # Beside the weights lies the best reward, a numpy scalar, under numpy 1's or numpy 2's name.
    scalar = np.float64(0).__reduce__()[0]
    numpy_scalars = [
        scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype,
        *{type(np.dtype(kind)) for kind in ("f4", "f8")},
    ]  # fmt: skip
    try:
        with torch.serialization.safe_globals(numpy_scalars):
            content = torch.load(file, "cpu", weights_only=True, mmap=True)
        unet.load_state_dict(content["model_state_dict"])
    except Exception as error:
        raise ValueError(
            f"{file} is no checkpoint of the thesis's code (a .pth with `model_state_dict`), or it "
            "is damaged, or its base is another policy. "
            f"Cause: {hub.cause(error)}"
        ) from error


def save(policy: Policy, folder: str | Path) -> None:
    """Save as a `DDPMPipeline` folder (safetensors) that plain diffusers loads."""
    DDPMPipeline(unet=policy.unet, scheduler=policy.scheduler).save_pretrained(str(folder))


def timesteps(policy: Policy, n_steps: int) -> torch.Tensor:
    """(n_steps,) int64, descending to 0: DDIM's evenly spaced steps ("leading" in diffusers).

    1000 → 40 gives 975, 950, …, 25, 0.
    """
    T = len(policy.alpha_bar)
    if not 1 <= n_steps <= T:
        raise ValueError(f"n_steps={n_steps}: must lie between 1 and the schedule's {T} steps")
    return torch.arange(n_steps).flip(0) * (T // n_steps)


def predict_noise(policy: Policy, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """eps_theta(x_t, t), float32, (N, C, H, W)."""
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.bf16):
        return policy.unet(x_t, t).sample.float()


def sigma(policy: Policy, t: torch.Tensor, t_prev: torch.Tensor, eta: float = 1.0) -> torch.Tensor:
    """sigma_t of the steps from t to t_prev, (N,) float32; 0 for a deterministic step.

    Arguments as in `transition`.
    """
    a_t, a_prev = _alpha_bars(policy, t, t_prev)
    return eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()


def transition(
    policy: Policy, x_t: torch.Tensor, t: torch.Tensor, t_prev: torch.Tensor, eta: float = 1.0
) -> Transition:
    """p_theta(x_{t_prev} | x_t), the only place that knows the DDIM step (equations 2.25–2.28).

    Equal to one `DDIMScheduler.step` per sample, clipping included, but t and t_prev may differ
    from sample to sample, so an update can fold all timesteps of a trajectory into one batch.

    Args:
        x_t: (N, C, H, W) float32.
        t: (N,) int64 timesteps in [0, T).
        t_prev: (N,) int64, the steps to go to; negative for the clean picture.
        eta: 0 for deterministic DDIM, 1 for the DDPM-like sampler that explores.
    """
    eps = predict_noise(policy, x_t, t)
    a_t, a_prev = (a.view(-1, 1, 1, 1) for a in _alpha_bars(policy, t, t_prev))
    std = sigma(policy, t, t_prev, eta).view(-1, 1, 1, 1)
    denoised = (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    if policy.scheduler.config.clip_sample:
        # As in diffusers, eps is not recomputed from the clamped picture. The clamp passes no
        # gradient at saturated pixels; the direct term below still does.
        denoised = denoised.clamp(-1, 1)
    # At eta = 1 the difference can round below zero at the last steps.
    direction = (1 - a_prev - std**2).clamp(min=0).sqrt()
    mean = a_prev.sqrt() * denoised + direction * eps
    return Transition(mean, std.view(-1), denoised)


def _alpha_bars(policy, t, t_prev) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_bar at t and at t_prev, (N,) each; 1 for the clean picture."""
    alpha_bar = policy.alpha_bar.to(t.device)
    return alpha_bar[t], torch.where(t_prev >= 0, alpha_bar[t_prev.clamp(min=0)], 1.0)
