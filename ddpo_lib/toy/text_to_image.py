"""Train a toy Stable Diffusion: an autoencoder, then text encoder and denoiser on its latents."""

from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from ddpo_lib.toy.drawing import SIZE, to_tensor
from ddpo_lib.toy.encoders import word_tokenizer
from ddpo_lib.toy.policies import draw_timesteps, warmed_cosine
from ddpo_lib.toy.training import DEVICE, DOMAINS, Drawn, fit

AUTOENCODER_STEPS, DENOISER_STEPS = 2500, 4000
N_TOKENS, WIDTH = 48, 96
N_CAPTIONS = 4
"""Captions of each drawing; they leave out different attributes."""
DROPPED = 0.1
"""Share of captions that are replaced by the empty one, for guidance."""
KL_WEIGHT = 1e-3


def new_autoencoder() -> diffusers.AutoencoderKL:
    """64x64 RGB to latents of 16x16x4 and back, 0.65 M parameters."""
    channels = (16, 32, 64)
    return diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=8,
        sample_size=SIZE,
    )


def new_denoiser() -> diffusers.UNet2DConditionModel:
    """The denoiser of latents, 4 M parameters, which attends to the text at 8x8."""
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


def train_text_to_image(
    drawn: list[Drawn],
    folder: Path,
    seed: int,
    autoencoder_steps: int = AUTOENCODER_STEPS,
    denoiser_steps: int = DENOISER_STEPS,
) -> None:
    """Train all parts on drawings and their captions, and save a `StableDiffusionPipeline`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pictures = np.concatenate([part.pictures for part in drawn])
    captions = [
        [text for part in drawn for text in DOMAINS[part.domain].captions(part.factors, rng)]
        for _ in range(N_CAPTIONS)
    ]
    tokenizer = word_tokenizer([text for own in captions for text in own])
    tokenizer.model_max_length = N_TOKENS
    vae = train_autoencoder(pictures, rng, autoencoder_steps)
    latents = encode(vae, pictures)
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=N_TOKENS,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )).to(DEVICE)  # fmt: skip
    unet = new_denoiser().to(DEVICE, memory_format=torch.channels_last)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip
    padded = {"padding": "max_length", "max_length": N_TOKENS, "return_tensors": "pt"}
    tokens = torch.stack([tokenizer(own, **padded).input_ids for own in captions])
    empty = tokenizer("", **padded).input_ids[0]
    train_denoiser(unet, encoder, scheduler, latents, tokens, empty, denoiser_steps)
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=encoder.cpu(), tokenizer=tokenizer, scheduler=scheduler,
        unet=unet.to("cpu", memory_format=torch.contiguous_format), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def train_autoencoder(
    pictures: np.ndarray, rng: np.random.Generator, n_steps: int, batch_size: int = 32
) -> diffusers.AutoencoderKL:
    """An autoencoder of the uint8 pictures, whose latents have a standard deviation of about 1."""
    vae = new_autoencoder().to(DEVICE)

    def loss() -> torch.Tensor:
        x = to_tensor(pictures[rng.integers(len(pictures), size=batch_size)]).to(DEVICE)
        posterior = vae.encode(x).latent_dist
        again = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(again, x) + F.mse_loss(again, x) + KL_WEIGHT * kl

    fit(vae, loss, n_steps, 2e-3, "the autoencoder")
    vae = vae.cpu().eval().requires_grad_(False)
    spread = encode(vae, pictures[: len(pictures) : max(1, len(pictures) // 1000)]).std().item()
    vae.register_to_config(scaling_factor=round(vae.config.scaling_factor / spread, 4))
    return vae


@torch.no_grad()
def encode(vae: diffusers.AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """The scaled latents (N, 4, 16, 16) of uint8 pictures: the means that the encoder gives."""
    parts = [
        vae.encode(to_tensor(pictures[i : i + 250])).latent_dist.mean
        for i in tqdm(range(0, len(pictures), 250), desc="encoding", leave=False)
    ]
    return torch.cat(parts) * vae.config.scaling_factor


def train_denoiser(
    unet, encoder, scheduler, latents, tokens, empty, n_steps, batch_size=48, rate=1e-3
) -> None:
    """Train denoiser and text encoder in place, as `policies.train_policy` does: v-prediction,
    timesteps in proportion to sqrt(alpha_bar), averaged weights.

    Args:
        latents: (N, 4, 16, 16), scaled.
        tokens: (captions, N, L) int64; one caption of a drawing is picked each time.
        empty: (L,) int64, the tokens of the empty text.
    """
    weights = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=1e-4)
    schedule = warmed_cosine(optimizer, n_steps)
    average = EMAModel(weights, decay=0.999, use_ema_warmup=True, power=0.75)
    bar = tqdm(range(n_steps), desc="training the text-to-image policy", unit="step")
    for step in bar:
        picks = torch.randint(len(latents), (batch_size,))
        words = tokens[torch.randint(len(tokens), (batch_size,)), picks]
        words[torch.rand(batch_size) < DROPPED] = empty
        x_0, eps = latents[picks], torch.randn(batch_size, *latents.shape[1:])
        t = draw_timesteps(scheduler, batch_size)
        x_t, v = scheduler.add_noise(x_0, eps, t), scheduler.get_velocity(x_0, eps, t)
        with torch.autocast(DEVICE, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            told = encoder(words.to(DEVICE))[0]
            guess = unet(x_t.to(DEVICE), t.to(DEVICE), told).sample
        loss = F.mse_loss(guess.float(), v.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        average.step(weights)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    average.copy_to(weights)
