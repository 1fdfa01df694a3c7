"""LoRA: low-rank changes to a network's attention projections, learned in the place of its weights.

They are peft's, by the names that diffusers' own training scripts use. What is saved is a folder
that `StableDiffusionPipeline.load_lora_weights` reads.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
FILE = "pytorch_lora_weights.safetensors"


def add(unet: torch.nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Put an adapter into a `UNet2DConditionModel`, in place; its own weights learn, no others. It
    starts at no change: the inner matrices are a seed's, the outer ones 0."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    settings = {"target_modules": list(PROJECTIONS), "init_lora_weights": "gaussian"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, **settings))


def is_in(unet) -> bool:
    return bool(getattr(unet, "peft_config", None))


class Without(torch.nn.Module):
    """A network with its adapter switched off: what it was before. It owns no weights."""

    def __init__(self, unet):
        super().__init__()
        self.of = [unet]  # a list, so that its weights are nobody's twice

    @property
    def device(self) -> torch.device:
        return self.of[0].device

    @property
    def config(self):
        return self.of[0].config

    @torch.no_grad()
    def forward(self, *inputs):
        unet = self.of[0]
        unet.disable_adapters()
        try:
            return unet(*inputs)
        finally:
            unet.enable_adapters()


def save(unet, folder: str | Path) -> None:
    """Write the adapter as `FILE` in a folder, with its rank and alpha."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    weights = {name: w.contiguous() for name, w in get_peft_model_state_dict(unet).items()}
    told = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=weights, unet_lora_adapter_metadata=told
    )


def restore(unet, folder: str | Path) -> None:
    """Put saved weights into the adapter that is in a network. ValueError if they are another's."""
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    weights = {name.removeprefix("unet."): w for name, w in load_file(Path(folder) / FILE).items()}
    if odd := weights.keys() ^ get_peft_model_state_dict(unet).keys():
        raise ValueError(f"{FILE} is another adapter's: {min(odd)} is in one of them alone")
    set_peft_model_state_dict(unet, weights)


def merge(unet, folder: str | Path) -> None:
    """Add a saved adapter to a network's own weights, in place."""
    unet.load_lora_adapter(str(folder), prefix="unet", weight_name=FILE, adapter_name="default")
    restore(unet, folder)  # looks whether all of it has a place, of which diffusers only warns
    unet.fuse_lora()
    unet.unload_lora()
