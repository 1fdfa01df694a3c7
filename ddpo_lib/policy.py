"""A policy: a denoiser with its noise schedule, and the transition p_theta(x_{t-1} | x_t)."""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpo_lib import hub

GOOD_BETAS = "num_train_timesteps of them, inside (0, 1), leaving some signal at the end"
SUPPORTED = {
    "pipeline": ("DDPMPipeline", "DDIMPipeline"), "unet": ("UNet2DModel",),
    "scheduler": ("DDPMScheduler", "DDIMScheduler"), "prediction_type": ("epsilon", "v_prediction"),
    "num_class_embeds": (None,), "class_embed_type": (None,), "variance": ("fixed",),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "rescale_betas_zero_snr": (False,), "thresholding": (False,),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "image size": ("known",), "weights": ("complete and finite",), "betas": (GOOD_BETAS,),
}  # fmt: skip
"""What a model must be, in the words of diffusers' configurations where they have one."""


class Unsupported(ValueError):
    """A model that this library cannot finetune."""


@dataclass(frozen=True)
class Context:
    """What N samples are conditioned on: a text each, and (N, L, D) float32 of its L tokens."""

    prompts: tuple[str, ...]
    embeddings: torch.Tensor

    def select(self, index: slice | torch.Tensor) -> "Context":
        """The entries of some samples."""
        kept = torch.arange(len(self.prompts))[index].tolist()
        return Context(tuple(self.prompts[i] for i in kept), self.embeddings[index])


@dataclass(frozen=True)
class Policy:
    """A diffusion model seen as a stochastic policy over denoising steps."""

    unet: torch.nn.Module  # UNet2DModel: of x_t (N, C, H, W) and t (N,) the noise in x_t, or v
    scheduler: object  # DDPMScheduler or DDIMScheduler: schedule, what unet predicts, clipping
    bf16: bool = True  # run unet under bfloat16 autocast; if not, TF32 is off, process-wide

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
        """(C, H, W) of the images that the network draws."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width


@dataclass(frozen=True)
class Transition:
    """The Gaussian p_theta(x_{t-1} | x_t) = N(mean, std^2 I) and what it was made from."""

    mean: torch.Tensor  # (N, C, H, W) float32
    std: torch.Tensor  # (N,) float32: sigma_t; 0 where the step is deterministic
    denoised: torch.Tensor  # (N, C, H, W) float32: x~_0 as predicted from x_t (equation 2.25)


def load(source: str | Path, device=None, bf16: bool = True, base=None) -> Policy:
    """Load a policy.

    Args:
        source: a model on the Hub, see `hub`; a folder of a `DDPMPipeline` or `DDIMPipeline`, also
            of the older layout with every file at its root; or a .pth file of the thesis's code.
        device: "cpu", "cuda", …; by default a GPU if there is one.
        bf16: see `Policy`; a GPU without bfloat16, such as a T4, runs float32 all the same.
        base: source of the policy that a .pth file was finetuned from: it has weights alone.

    Raises:
        FileNotFoundError: what source names is missing, incomplete or truncated.
        ValueError: the model is none of those in `SUPPORTED`, or its weights are another network's.
    """
    source = str(source)
    unet, scheduler = _read_pth(source, base) if source.endswith(".pth") else _read(source)
    net, schedule, betas = unet.config, scheduler.config, scheduler.betas
    learned = net.in_channels != net.out_channels or "learn" in str(schedule.get("variance_type"))
    finite = all(value.isfinite().all() for value in unet.state_dict().values())
    inside = ((betas > 0) & (betas < 1)).all() and scheduler.alphas_cumprod[-1] > 0
    found = {
        "variance": "learned" if learned else "fixed",
        "image size": "known" if net.sample_size else "unknown",
        "weights": "complete and finite" if finite else "not all finite",
        "betas": GOOD_BETAS if inside and len(betas) == schedule.num_train_timesteps else "others",
    }
    _check(source, {**net, **schedule, **found})
    unet = unet.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    # A copy: safetensors maps weights to any address, and kernels round by a weight's alignment.
    unet = copy.deepcopy(unet.to(memory_format=torch.channels_last))
    return Policy(unet, scheduler, bf16 and has_bf16(unet.device))


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; a GPU such as a T4 only emulates it, slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _read(source: str) -> tuple:
    """Network and scheduler of a folder or of a model on the Hub."""
    import diffusers  # takes seconds: the functions that need it do so

    if hub.locate(source) is None and not Path(source).is_dir():
        raise FileNotFoundError(f"no policy at {source!r}: the folder does not exist")
    folder = hub.fetch("policy", source)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = {part: (index.get(part) or [None])[-1] for part in ("unet", "scheduler")}
        _check(source, {"pipeline": index["_class_name"]} | parts)
        at = {part: folder / part if (folder / part).is_dir() else folder for part in parts}
        # Left to itself, diffusers calls a .bin file unsafe, which it yet reads weights-only.
        options = {"use_safetensors": any(folder.rglob("diffusion_pytorch_model*.safetensors"))}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        unet, report = diffusers.UNet2DModel.from_pretrained(at["unet"], **options)
        scheduler = getattr(diffusers, parts["scheduler"]).from_pretrained(at["scheduler"])
        odd = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        if odd:  # diffusers would leave them out, with a warning or without
            _check(source, {"weights": f"another network's, with other tensors, such as {odd[0]}"})
    except Unsupported:
        raise
    except Exception as error:
        needed = "a complete folder of a DDPMPipeline or DDIMPipeline, or the id of one on the Hub"
        said = f"cannot load a policy from {source!r}: it must be {needed}"
        raise FileNotFoundError(f"{said}. Cause: {hub.cause(error)}") from error
    return unet, scheduler


def _check(source: str, found: Mapping[str, object]) -> None:
    if faults := {name: v for name, v in found.items() if v not in SUPPORTED.get(name, (v,))}:
        needed = {name: SUPPORTED[name] for name in faults}
        raise Unsupported(f"{source}: not supported are {faults}; supported are {needed}")


def _read_pth(file: str, base: str | Path | None) -> tuple:
    """Network and scheduler of the base, with the weights that the thesis's code saved."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no policy at {file!r}: the file does not exist")
    if base is None:
        origin = "name the policy that it was finetuned from, base='google/ddpm-celebahq-256'"
        raise ValueError(f"{file} holds weights alone: {origin}")
    unet, scheduler = _read(str(base))
    # Beside the weights lies the best reward, a numpy scalar, under numpy 1's or numpy 2's name.
    scalar, types = np.float64(0).__reduce__()[0], (np.dtypes.Float32DType, np.dtypes.Float64DType)
    trusted = [np.dtype, *types, scalar, (scalar, "numpy.core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(trusted):
            content = torch.load(file, "cpu", weights_only=True, mmap=True)
        unet.load_state_dict(content["model_state_dict"])
    except Exception as error:
        fault = "no checkpoint of the thesis's code, or it is damaged, or its base is another"
        raise ValueError(f"{file} is {fault}. Cause: {hub.cause(error)}") from error
    return unet, scheduler


def save(policy: Policy, folder: str | Path) -> None:
    """Save as a folder that plain diffusers loads (safetensors): a `DDPMPipeline`, or a
    `DDIMPipeline` for a policy with a `DDIMScheduler`."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

    if not isinstance(policy.unet, torch.nn.Module):
        raise ValueError("a guided policy has no network of its own: save the policy it guides")
    kind = DDIMPipeline if isinstance(policy.scheduler, DDIMScheduler) else DDPMPipeline
    kind(unet=policy.unet, scheduler=policy.scheduler).save_pretrained(str(folder))
    file = Path(folder) / "unet/config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # where this machine had the model
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def encode(policy: Policy, prompts: Sequence[str] | None) -> Context | None:
    """The context of N prompts, None for None, as it must be: no policy takes text yet."""
    if prompts is not None:
        raise ValueError("this policy takes no text: prompts must be None")
    return None


def decode(policy: Policy, x_0: torch.Tensor) -> torch.Tensor:
    """The images (N, C, H, W), about in [-1, 1], of finished samples: x_0 itself, being pixels."""
    return x_0


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
    """eps_theta(x_t, t), (N, C, H, W) float32, also of a network that predicts v. The context must
    be None: no policy takes text yet."""
    if context is not None:
        raise ValueError("this policy takes no text: context must be None")
    if not policy.bf16:  # no TF32, and for good: a context manager would end before backward
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if hasattr(torch.backends.cudnn, "conv"):  # torch >= 2.9 has a setting above this one too
            torch.backends.cudnn.conv.fp32_precision = "ieee"
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.bf16):
        output = policy.unet(x_t, t).sample.to(x_t.dtype)
    if policy.scheduler.config.prediction_type == "epsilon":
        return output
    a_t = policy.alpha_bar_at(t)
    return a_t.sqrt() * output + (1 - a_t).sqrt() * x_t


def sigma(policy: Policy, t: torch.Tensor, t_prev: torch.Tensor, eta: float = 1.0) -> torch.Tensor:
    """sigma_t, (N,) float32, of steps from t to t_prev as in `transition`; 0 if deterministic."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must lie between 0 (deterministic) and 1")
    a_t, a_prev = policy.alpha_bar_at(t), policy.alpha_bar_at(t_prev)
    return eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt().flatten()


def transition(policy, x_t, t, t_prev, eta=1.0, context=None) -> Transition:
    """p_theta(x_{t_prev} | x_t), the only place that knows the DDIM step (equations 2.25–2.28).

    Equal to one `DDIMScheduler.step` per sample, clipping included, but t and t_prev may differ
    from sample to sample, so an update can fold all timesteps of a trajectory into one batch.

    Args:
        x_t: (N, C, H, W) float32.
        t: (N,) int64 timesteps in [0, T).
        t_prev: (N,) int64, the timesteps to go to, see `steps`; negative for the clean image.
        eta: 0 for deterministic DDIM, 1 for the DDPM-like sampler that explores.
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
