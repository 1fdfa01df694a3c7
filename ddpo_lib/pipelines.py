"""Policies on the disk: folders of diffusers' pipelines, adapters, and the thesis's .pth files."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ddpo_lib import adapter, disk, hub
from ddpo_lib.text import Text

GOOD_BETAS = "num_train_timesteps of them, inside (0, 1), leaving some signal at the end"
SUPPORTED = {
    "pipeline": ("DDPMPipeline", "DDIMPipeline", "StableDiffusionPipeline"),
    "unet": ("UNet2DModel",), "text-to-image unet": ("UNet2DConditionModel",),
    "scheduler": ("DDPMScheduler", "DDIMScheduler"), "prediction_type": ("epsilon", "v_prediction"),
    "num_class_embeds": (None,), "class_embed_type": (None,), "addition_embed_type": (None,),
    "variance": ("fixed",), "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "rescale_betas_zero_snr": (False,), "thresholding": (False,),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "image size": ("known",), "weights": ("complete and finite",), "betas": (GOOD_BETAS,),
}  # fmt: skip
"""What a model must be, in the words of diffusers' configurations where they have one."""


class Unsupported(ValueError):
    """A model that this library cannot finetune."""


def read(source: str, base: str | Path | None = None) -> tuple:
    """Network, scheduler and `Text`, or None, of a source as in `policy.load`, as they must be."""
    if source.endswith(".pth"):
        unet, scheduler, text = _read_pth(source, base)
    elif (Path(source) / adapter.FILE).is_file():
        unet, scheduler, text = _read_adapter(source, base)
    else:
        unet, scheduler, text = _read_pipeline(source)
    net, schedule, betas = unet.config, scheduler.config, scheduler.betas
    learned = net.in_channels != net.out_channels or "learn" in str(schedule.get("variance_type"))
    networks = [unet, text.encoder, text.vae] if text else [unet]
    finite = all(v.isfinite().all() for net in networks for v in net.state_dict().values())
    inside = ((betas > 0) & (betas < 1)).all() and scheduler.alphas_cumprod[-1] > 0
    found = {
        "variance": "learned" if learned else "fixed",
        "image size": "known" if net.sample_size else "unknown",
        "weights": "complete and finite" if finite else "not all finite",
        "betas": GOOD_BETAS if inside and len(betas) == schedule.num_train_timesteps else "others",
    }
    _check(source, {**net, **schedule, **found})
    return unet, scheduler, text


def write(policy, folder: str | Path) -> None:
    """See `policy.save`."""
    import diffusers

    if not isinstance(policy.unet, torch.nn.Module):
        raise ValueError("a guided policy has no network of its own: save the policy it guides")
    if adapter.is_in(policy.unet):
        adapter.save(policy.unet, folder)
        return disk.open_to_user(Path(folder))
    parts = {"unet": policy.unet, "scheduler": policy.scheduler}
    kind = diffusers.DDPMPipeline
    if policy.text:
        kind, text = diffusers.StableDiffusionPipeline, policy.text
        parts |= {"text_encoder": text.encoder, "vae": text.vae, "tokenizer": text.tokenizer}
        parts |= dict.fromkeys(("safety_checker", "feature_extractor"))
        parts["requires_safety_checker"] = False
    elif isinstance(policy.scheduler, diffusers.DDIMScheduler):
        kind = diffusers.DDIMPipeline
    kind(**parts).save_pretrained(str(folder))
    for file in Path(folder).glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where this machine had the model
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    disk.open_to_user(Path(folder))


def _read_pipeline(source: str) -> tuple:
    """Of a folder or of a model on the Hub."""
    import diffusers  # takes seconds: the functions that need it do so

    if hub.locate(source) is None and not Path(source).is_dir():
        raise FileNotFoundError(f"no policy at {source!r}: there is no such folder")
    folder = hub.fetch("policy", source)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = {part: (index.get(part) or [None])[-1] for part in ("unet", "scheduler")}
        with_text = index["_class_name"] == "StableDiffusionPipeline"
        found = {"text-to-image unet": parts["unet"]} if with_text else parts
        _check(source, {"pipeline": index["_class_name"]} | found)
        at = {part: folder / part if (folder / part).is_dir() else folder for part in parts}
        # Left to itself, diffusers calls a .bin file unsafe, which it yet reads weights-only.
        safe = any(at["unet"].glob("diffusion_pytorch_model*.safetensors"))
        kind = getattr(diffusers, parts["unet"])
        unet = _network(source, kind, at["unet"], ("unexpected",), use_safetensors=safe)
        if with_text:
            return unet, *_read_text(source, folder, index, unet)
        scheduler = getattr(diffusers, parts["scheduler"]).from_pretrained(at["scheduler"])
    except Unsupported:
        raise
    except Exception as error:
        needed = "a complete folder of a DDPMPipeline, a DDIMPipeline or a StableDiffusionPipeline"
        said = f"cannot load a policy from {source!r}: it must be {needed}, or the id of one on the"
        raise FileNotFoundError(f"{said} Hub. Cause: {hub.cause(error)}") from error
    return unet, scheduler, None


def _network(source: str, kind: type, folder: Path, refused=(), **options):
    """A network, of whose missing tensors the loaders say no more than a warning, if that."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    network, report = kind.from_pretrained(folder, **options)
    if odd := [name for k in ("missing", "mismatched", *refused) for name in report[f"{k}_keys"]]:
        _check(source, {"weights": f"another network's, with other tensors, such as {odd[0]}"})
    return network


def _read_text(source: str, folder: Path, index: dict, unet) -> tuple:
    """Scheduler and `Text` of a `StableDiffusionPipeline`. The pipeline mends the schedulers of old
    folders, which lack an offset or clip latents; the steps are DDIM's, whatever it names."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    networks = {}
    for part in ("text_encoder", "vae"):  # old encoders have a tensor that is not needed
        kind = getattr(importlib.import_module(index[part][0]), index[part][1])
        networks[part] = _network(source, kind, folder / part)
    left_out = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, unet=unet, requires_safety_checker=False, **networks, **left_out
    )
    frozen = [part.float().requires_grad_(False).eval() for part in (pipe.text_encoder, pipe.vae)]
    return DDIMScheduler.from_config(pipe.scheduler.config), Text(pipe.tokenizer, *frozen)


def _check(source: str, found: Mapping[str, object]) -> None:
    if faults := {name: v for name, v in found.items() if v not in SUPPORTED.get(name, (v,))}:
        needed = {name: SUPPORTED[name] for name in faults}
        raise Unsupported(f"{source}: not supported are {faults}; supported are {needed}")


def _read_base(source: str, base: str | Path | None) -> tuple:
    if base is None:
        origin = "name the policy that it was finetuned from, base='google/ddpm-celebahq-256'"
        raise ValueError(f"{source} holds weights alone: {origin}")
    return _read_pipeline(str(base))


def _read_adapter(source: str, base: str | Path | None) -> tuple:
    """The base, with an adapter merged into its weights."""
    unet, scheduler, text = _read_base(source, base)
    if text is None:
        raise ValueError(f"{source} is the adapter of a text-to-image policy: {base} is none")
    try:
        adapter.merge(unet, source)
    except Exception as error:
        fault = f"no adapter that fits {base}, or it is damaged"
        raise ValueError(f"{source} is {fault}. Cause: {hub.cause(error)}") from error
    return unet, scheduler, text


def _read_pth(file: str, base: str | Path | None) -> tuple:
    """The base, with the weights that the thesis's code saved."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no policy at {file!r}: the file does not exist")
    unet, scheduler, text = _read_base(file, base)
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
    return unet, scheduler, text
