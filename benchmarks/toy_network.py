"""Time the toy denoiser at 64x64 against the one that drew 32x32, in turns.

    python benchmarks/toy_network.py [--repeats 9] [--threads 1] [--small]

The smaller network is the one that the toy world had at first, of as many weights. Both run
under bfloat16 autocast in channels_last, a batch of 64 forward, and forward and backward.

Prints one JSON object.
"""

import argparse
import json
import statistics
import time

import torch
from diffusers import UNet2DModel

from ddpo_lib.toy.policies import new_unet

CHANNELS = (16, 32, 64, 112)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="turns of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="batches of two")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    first = UNet2DModel(
        sample_size=32, block_out_channels=CHANNELS, layers_per_block=1, norm_num_groups=2,
        add_attention=False, down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
    )  # fmt: skip
    networks = {"32": first, "64": new_unet()}
    batch, times = 2 if arguments.small else 64, {}
    for _ in range(arguments.repeats):
        for size, network in networks.items():
            network.to(memory_format=torch.channels_last)
            for what, work in (("forward", forward), ("forward_backward", backward)):
                start = time.perf_counter()
                work(network, torch.randn(batch, 3, int(size), int(size)))
                times.setdefault((what, size), []).append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in times.items()}
    result = {
        f"{what}_ratio": round(medians[what, "64"] / medians[what, "32"], 3)
        for what in ("forward", "forward_backward")
    }
    result |= {f"{what}_{size}_s": round(value, 4) for (what, size), value in medians.items()}
    result["parameters_64"] = sum(p.numel() for p in networks["64"].parameters())
    print(json.dumps(result | {"threads": arguments.threads, "torch": torch.__version__}, indent=2))


@torch.no_grad()
def forward(network, x) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        network(x.to(memory_format=torch.channels_last), torch.full((len(x),), 500))


def backward(network, x) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x.to(memory_format=torch.channels_last), torch.full((len(x),), 500)).sample
    output.float().square().mean().backward()


if __name__ == "__main__":
    main()
