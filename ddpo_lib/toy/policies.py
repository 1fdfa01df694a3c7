"""Train a toy policy: a small pixel-space DDPM on pictures of one domain (Algorithm 1)."""

import math

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ddpo_lib.toy.drawing import to_tensor

T = 1000
CONSTANT = 10.0


def new_unet() -> UNet2DModel:
    """The toy denoiser: 32x32 RGB, about 2 M parameters, most of its work at low resolution.

    It starts as the identity, eps_theta(x_t, t) = x_t, which is right where x_t is nearly all
    noise. From random weights that takes thousands of steps to learn, and until it is exact the
    mean colour of a picture, which the noisiest steps settle, comes out near the average.
    """
    channels = (16, 32, 64, 112)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
    )
    _start_as_identity(unet)
    return unet


@torch.no_grad()
def _start_as_identity(unet: UNet2DModel) -> None:
    """Carry ±x_t through the outermost skip connection: silu(x) - silu(-x) = x exactly.

    The last group norm would divide by the standard deviation of x_t and so forget how large x_t
    is. At the noisiest steps 1 % of x_t is as much as the whole picture: it would stay in it as
    speckle. Two large constants, ±C, in the carriers' group make the division nearly constant.
    """
    last = unet.up_blocks[-1].resnets[-1]
    n_hidden = last.conv_shortcut.in_channels - unet.conv_in.out_channels
    for layer in (unet.conv_in, last.conv_shortcut, last.conv2):
        layer.weight[:8] = 0
        layer.bias[:8] = 0
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    for channel in range(3):
        for sign, carrier in ((1.0, 2 * channel), (-1.0, 2 * channel + 1)):
            unet.conv_in.weight[carrier, channel, 1, 1] = sign
            last.conv_shortcut.weight[carrier, n_hidden + carrier] = 1.0
            unet.conv_out.weight[channel, carrier, 1, 1] = sign
    last.conv_shortcut.bias[6:8] = torch.tensor([CONSTANT, -CONSTANT])
    unet.conv_norm_out.weight[:6] = ((6 + 2 * CONSTANT**2) / 8) ** 0.5


def train_policy(
    pictures, n_steps: int, seed: int, batch_size: int = 64, learning_rate: float = 2e-3
) -> DDPMPipeline:
    """Algorithm 1 with an exponential moving average of the weights.

    Args:
        pictures: uint8 array (N, 32, 32, 3).
        n_steps: optimizer steps.

    Returns:
        A `DDPMPipeline` that holds the averaged weights and the linear schedule with T = 1000.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = new_unet().to(device)
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule="linear", clip_sample=True)
    optimizer = torch.optim.Adam(unet.parameters(), lr=learning_rate)
    warmup = n_steps // 50 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1, i / n_steps))),
    )
    average = EMAModel(unet.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    bar = tqdm(range(n_steps), desc="training the policy", unit="step")
    for step in bar:
        picks = torch.randint(len(pictures), (batch_size,), generator=generator)
        x_0 = to_tensor(pictures[picks.numpy()])
        # One timestep from each of batch_size equal strata: still uniform, with less variance.
        strata = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
        t = (strata * T / batch_size).long()
        eps = torch.randn(x_0.shape, generator=generator)
        x_t = scheduler.add_noise(x_0, eps, t)
        with torch.autocast(device, torch.bfloat16):
            prediction = unet(x_t.to(device), t.to(device)).sample
        loss = (prediction.float() - eps.to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.step(unet.parameters())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    average.copy_to(unet.parameters())
    return DDPMPipeline(unet=unet.cpu(), scheduler=scheduler)
