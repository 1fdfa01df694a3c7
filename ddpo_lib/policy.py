"""A policy: a denoiser with its noise schedule, and the transition p_theta(x_{t-1} | x_t)."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpo_lib import pipelines
from ddpo_lib.pipelines import Unsupported  # noqa: F401, raised by `load`
from ddpo_lib.text import Context, Text


@dataclass(frozen=True)
class Policy:
    """A diffusion model seen as a stochastic policy over denoising steps."""

    unet: torch.nn.Module  # of x_t (N, C, H, W), t (N,) and a text's tokens: the noise, or v
    scheduler: object  # DDPMScheduler or DDIMScheduler: schedule, what unet predicts, clipping
    bf16: bool = True  # run unet under bfloat16 autocast; if not, TF32 is off, process-wide
    text: Text | None = None  # of a text-to-image policy, whose states are latents
    guidance: float = 1.0  # scale of classifier-free guidance (equation 2.24); at 1 there is none

    @property
    def alpha_bar(self) -> torch.Tensor:
        """(T,) float32: the cumulative product of 1 - beta_t (equation 2.7)."""
        return self.scheduler.alphas_cumprod

    def alpha_bar_at(self, t: torch.Tensor) -> torch.Tensor:
        """alpha_bar of timesteps t (N,), (N, 1, 1, 1); for negative ones, where the last step goes,
        1, or alpha_bar[0] where the scheduler says."""
        found = self.alpha_bar.to(t.device)[t.clamp(min=0)]
        if self.scheduler.config.get("set_alpha_to_one", True):
            found = torch.where(t >= 0, found, 1.0)
        return found.view(-1, 1, 1, 1)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the states: images, or latents."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width


@dataclass(frozen=True)
class Transition:
    """The Gaussian p_theta(x_{t-1} | x_t) = N(mean, std^2 I) and what it was made from."""

    mean: torch.Tensor  # (N, C, H, W) float32
    std: torch.Tensor  # (N,) float32: sigma_t; 0 where the step is deterministic
    denoised: torch.Tensor  # (N, C, H, W) float32: x~_0 as predicted from x_t (equation 2.25)


def load(source: str | Path, device=None, bf16: bool = True, base=None, guidance=1.0) -> Policy:
    """Load a policy.

    Args:
        source: a model on the Hub, see `hub`; a folder of a `DDPMPipeline` or `DDIMPipeline`, also
            of the older layout with every file at its root, or of a `StableDiffusionPipeline`; a
            folder with an adapter, see `adapter`; or a .pth file of the thesis's code.
        device: "cpu", "cuda", …; by default a GPU if there is one.
        bf16: see `Policy`; a GPU without bfloat16, such as a T4, runs float32 all the same.
        base: source of the policy that an adapter or a .pth file was finetuned from: they have
            nothing else.
        guidance: see `Policy`.

    Raises:
        FileNotFoundError: what source names is missing, incomplete or truncated.
        ValueError: the model is none of those in `pipelines.SUPPORTED`, or its weights are another
            network's.
    """
    if not 1 <= guidance < float("inf"):
        raise ValueError(f"guidance={guidance!r}: must be a number from 1 up; at 1 there is none")
    unet, scheduler, text = pipelines.read(str(source), base)
    if guidance != 1 and text is None:
        raise ValueError(f"guidance={guidance}: {source} takes no text, leave it at 1")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    unet = unet.to(device).eval()
    # A copy: safetensors maps weights to any address, and kernels round by a weight's alignment.
    unet = copy.deepcopy(unet.to(memory_format=torch.channels_last))
    if text is not None:
        text = Text(
            text.tokenizer, *(copy.deepcopy(p.to(device)) for p in (text.encoder, text.vae))
        )
    return Policy(unet, scheduler, bf16 and has_bf16(unet.device), text, float(guidance))


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; a GPU such as a T4 only emulates it, slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def save(policy: Policy, folder: str | Path) -> None:
    """Save as a folder that plain diffusers loads (safetensors): a `DDPMPipeline`, or a
    `DDIMPipeline` for a policy with a `DDIMScheduler`; with text a `StableDiffusionPipeline`, or of
    its adapter alone one for `load_lora_weights`."""
    pipelines.write(policy, folder)


def encode(policy: Policy, prompts: Sequence[str] | None) -> Context | None:
    """The context of N prompts; None for a policy that takes no text, whose prompts are None.
    ValueError for a prompt that is empty or too long, or where prompts are missing."""
    if policy.text is not None and prompts is not None:
        return policy.text.encode(prompts)
    if policy.text is not None:
        raise ValueError("this policy draws from text: give it prompts")
    if prompts is not None:
        raise ValueError("this policy takes no text: prompts must be None")
    return None


def decode(policy: Policy, x_0: torch.Tensor) -> torch.Tensor:
    """The images (N, C, H, W), about in [-1, 1], of finished samples: of latents what the decoder
    makes of them, otherwise x_0 itself."""
    return x_0 if policy.text is None else policy.text.decode(x_0)


def steps(policy: Policy, n_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The timesteps t of a chain, descending, and t_prev, where each step goes; (n_steps,) int64.

    Both as in diffusers' DDIMScheduler, for the spacing and the offset that the policy's scheduler
    names: t_prev = t - T // n_steps, negative for the clean image. "leading", 1000 → 40, gives
    t = 975, 950, …, 25, 0. Warns where the first t is so early that pure noise is a poor start.
    """
    from diffusers import DDIMScheduler

    T = len(policy.alpha_bar)
    if type(n_steps) is not int or not 1 <= n_steps <= T:
        raise ValueError(f"n_steps={n_steps!r}: must be a whole number from 1 to {T}")
    scheduler = DDIMScheduler.from_config(configuration(policy.scheduler))
    scheduler.set_timesteps(n_steps)
    t = scheduler.timesteps
    if t[0] >= T or t[-1] < 0:  # by an offset, or by a rounding error of "trailing"
        reach = f"run from {t[0]} to {t[-1]}, which leaves 0 to {T - 1}"
        raise ValueError(f"n_steps={n_steps}: diffusers' timesteps {reach}; take another n_steps")
    if (signal := policy.alpha_bar[t[0]].sqrt().item()) > 0.2:
        late = f"timestep {t[0]} of {T}, where {signal:.2f} of the image should be left"
        said = f"n_steps={n_steps}: the chain starts from pure noise at {late}"
        warnings.warn(f"{said}; take another n_steps or timestep_spacing", stacklevel=2)
    return t, t - T // n_steps


def configuration(model) -> dict:
    """All settings of a scheduler or network of diffusers, without its own notes, by which another
    `from_config` would take those that were given by position for defaults."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def predict_noise(policy, x_t, t, context: Context | None = None) -> torch.Tensor:
    """eps_theta(x_t, t, c), (N, C, H, W) float32, also of a network that predicts v.

    With a guidance scale g it is eps(empty) + g (eps(c) - eps(empty)) (equation 2.24): one call of
    the network on both halves, and a gradient through both. ValueError for a context where the
    policy takes no text, or none where it does.
    """
    if (context is None) != (policy.text is None):
        needed = "takes no text: context must be None" if context else "draws from text: encode it"
        raise ValueError(f"this policy {needed}")
    if not policy.bf16:  # no TF32, and for good: a context manager would end before backward
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if hasattr(torch.backends.cudnn, "conv"):  # torch >= 2.9 has a setting above this one too
            torch.backends.cudnn.conv.fp32_precision = "ieee"
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=policy.bf16):
        output = _call(policy, x_t, t, context).to(x_t.dtype)
    if policy.scheduler.config.prediction_type == "epsilon":
        return output
    a_t = policy.alpha_bar_at(t)
    return a_t.sqrt() * output + (1 - a_t).sqrt() * x_t


def _call(policy, x_t, t, context: Context | None) -> torch.Tensor:
    """What the network says, guided."""
    if context is None:
        return policy.unet(x_t, t).sample
    told = context.embeddings.to(x_t.device)
    if policy.guidance == 1:
        return policy.unet(x_t, t, told).sample
    both = torch.cat([context.empty.to(x_t.device).expand_as(told), told])
    empty, full = policy.unet(torch.cat([x_t, x_t]), torch.cat([t, t]), both).sample.chunk(2)
    return empty + policy.guidance * (full - empty)


def sigma(policy: Policy, t: torch.Tensor, t_prev: torch.Tensor, eta=1.0) -> torch.Tensor:
    """sigma_t, (N,) float32, of steps from t to t_prev as in `transition`; 0 if deterministic."""
    etas = torch.as_tensor(eta, dtype=torch.float64)
    if len(wrong := etas[~((etas >= 0) & (etas <= 1))]):
        raise ValueError(f"eta={wrong[0]:.12g}: must lie between 0 (deterministic) and 1")
    a_t, a_prev = policy.alpha_bar_at(t), policy.alpha_bar_at(t_prev)
    variance = (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
    return etas.to(a_t.device, a_t.dtype) * variance.sqrt().flatten()


def transition(policy, x_t, t, t_prev, eta=1.0, context=None) -> Transition:
    """p_theta(x_{t_prev} | x_t), the only place that knows the DDIM step (equations 2.25–2.28).

    Equal to one `DDIMScheduler.step` per sample, clipping included, but t and t_prev may differ
    from sample to sample, so an update can fold all timesteps of a trajectory into one batch.

    Args:
        x_t: (N, C, H, W) float32.
        t: (N,) int64 timesteps in [0, T).
        t_prev: (N,) int64, the timesteps to go to, see `steps`; negative for the clean image.
        eta: 0 for deterministic DDIM, 1 for the DDPM-like sampler that explores; a number, or one
            for each sample, (N,) float32.
        context: `Context` of these N samples, or None.
    """
    eps = predict_noise(policy, x_t, t, context)
    a_t, a_prev = policy.alpha_bar_at(t), policy.alpha_bar_at(t_prev)
    std = sigma(policy, t, t_prev, eta).view(-1, 1, 1, 1)
    denoised = (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    if policy.scheduler.config.clip_sample:
        # As in diffusers, eps is not recomputed. The clamp passes no gradient at saturated pixels;
        # the direct term below still does.
        limit = policy.scheduler.config.clip_sample_range
        denoised = denoised.clamp(-limit, limit)
    # At eta = 1 the difference can round below zero at the last steps.
    direction = (1 - a_prev - std**2).clamp(min=0).sqrt()
    mean = a_prev.sqrt() * denoised + direction * eps
    return Transition(mean, std.view(-1), denoised)
