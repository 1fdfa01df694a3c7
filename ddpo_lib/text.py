"""What a text-to-image policy has beside its denoiser: prompts to embeddings, latents to images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ddpo_lib.settings import check_text


@dataclass(frozen=True)
class Context:
    """What N samples are conditioned on: a text each, and what the denoiser sees of it."""

    prompts: tuple[str, ...]
    embeddings: torch.Tensor  # (N, L, D) float32: of its L tokens
    empty: torch.Tensor | None = None  # (1, L, D) float32: of the empty text, for guidance

    def select(self, index: slice | torch.Tensor) -> "Context":
        """The entries of some samples."""
        kept = torch.arange(len(self.prompts))[index].tolist()
        return Context(tuple(self.prompts[i] for i in kept), self.embeddings[index], self.empty)


@dataclass(frozen=True)
class Text:
    """The frozen parts of a Stable Diffusion."""

    tokenizer: object  # CLIPTokenizer
    encoder: torch.nn.Module  # CLIPTextModel
    vae: torch.nn.Module  # AutoencoderKL

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Context:
        """ValueError for a prompt that is empty or longer than the encoder reads."""
        length = self.tokenizer.model_max_length
        for prompt in dict.fromkeys(prompts):
            check_text(f"prompt {prompt!r}", prompt)
            if (n := len(self.tokenizer(prompt).input_ids)) > length:
                said = f"prompt {prompt!r} has {n} tokens, the text encoder reads {length}"
                raise ValueError(f"{said}: shorten it")
        texts = list(dict.fromkeys(("", *prompts)))
        padded = {"padding": "max_length", "max_length": length, "return_tensors": "pt"}
        tokens = self.tokenizer(texts, **padded)
        device = next(self.encoder.parameters()).device
        masked = getattr(self.encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        seen = self.encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float()
        place = {text: i for i, text in enumerate(texts)}
        rows = torch.tensor([place[p] for p in prompts], dtype=torch.long, device=device)
        return Context(tuple(prompts), seen[rows], seen[:1])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int = 50) -> torch.Tensor:
        """Images (N, 3, H, W), about in [-1, 1], of latents (N, C, h, w)."""
        scaled = latents / self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(part).sample for part in scaled.split(batch_size)])
