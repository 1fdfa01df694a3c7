"""Train a toy policy: a small pixel-space DDPM on pictures of one domain (Algorithm 1)."""

import math

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ddpo_lib.toy.drawing import SIZE, to_tensor

T = 1000


def new_unet() -> UNet2DModel:
    """The toy denoiser: 64x64 RGB, 2 M parameters, most of its work at low resolution."""
    channels = (16, 16, 32, 64, 112)
    return UNet2DModel(
        sample_size=SIZE,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
    )


def train_policy(
    pictures, n_steps: int, seed: int, batch_size: int = 64, learning_rate: float = 2e-3
) -> DDPMPipeline:
    """Algorithm 1 in v-prediction, with an exponential moving average of the weights.

    The network learns v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022). An
    error of eps is multiplied by 93 in the denoised state at t = 950, more than bfloat16 resolves;
    one of v is not multiplied at all. Timesteps are drawn in proportion to sqrt(alpha_bar). That is
    half-way, in logarithms, between v at uniform timesteps, where the noisiest half, of which
    little can be known, gives most of the gradient, and eps, where the noisiest count nothing.

    Args:
        pictures: uint8 array (N, 64, 64, 3).
        n_steps: optimizer steps.

    Returns:
        A `DDPMPipeline` that holds the averaged weights and the linear schedule with T = 1000.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = new_unet().to(device, memory_format=torch.channels_last)
    scheduler = DDPMScheduler(
        num_train_timesteps=T, beta_schedule="linear", prediction_type="v_prediction"
    )
    optimizer = torch.optim.Adam(unet.parameters(), lr=learning_rate)
    schedule = warmed_cosine(optimizer, n_steps)
    average = EMAModel(unet.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    bar = tqdm(range(n_steps), desc="training the policy", unit="step")
    for step in bar:
        picks = torch.randint(len(pictures), (batch_size,), generator=generator)
        x_0 = to_tensor(pictures[picks.numpy()])
        t = draw_timesteps(scheduler, batch_size, generator)
        eps = torch.randn(x_0.shape, generator=generator)
        x_t, v = scheduler.add_noise(x_0, eps, t), scheduler.get_velocity(x_0, eps, t)
        x_t = x_t.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            prediction = unet(x_t, t.to(device)).sample
        loss = F.mse_loss(prediction.float(), v.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.step(unet.parameters())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    average.copy_to(unet.parameters())
    unet = unet.to("cpu", memory_format=torch.contiguous_format)
    return DDPMPipeline(unet=unet, scheduler=scheduler)


def warmed_cosine(optimizer, n_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate rises over a fiftieth of the steps, and falls to 0 by a cosine."""
    warmup = n_steps // 50 + 1
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1, i / n_steps))),
    )


def draw_timesteps(scheduler, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """n timesteps in proportion to sqrt(alpha_bar), see `train_policy`, (n,) int64: one from each
    of n equally likely strata, which has less variance than without."""
    cumulative = scheduler.alphas_cumprod.sqrt().cumsum(0)
    cumulative = cumulative / cumulative[-1]
    strata = torch.arange(n) + torch.rand(n, generator=generator)
    return torch.searchsorted(cumulative, strata / n).clamp(max=len(cumulative) - 1)
