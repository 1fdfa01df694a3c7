"""A value network V(x_t, t), the critic of DPOK and TDPO: a small one, for any image size."""

import torch
from torch import nn

from ddpo_lib import parallel
from ddpo_lib.experience import Experience


class Value(nn.Module):
    """Four strided convolutions of x_t, their mean over space, and t: (N, C, H, W), (N,) → (N,).

    The last layer starts at 0, so a new critic expects nothing: the mean of standardised rewards.
    """

    def __init__(self, channels: int, n_timesteps: int):
        super().__init__()
        self.n_timesteps = n_timesteps
        widths = (channels, 16, 32, 64, 64)
        layers = []
        for inward, outward in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(inward, outward, 3, stride=2, padding=1), nn.SiLU()]
        self.eye = nn.Sequential(*layers)
        self.hidden = nn.Linear(64 + 16, 64)
        self.out = nn.Linear(64, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        # Mean output of each hidden unit over the layer's, as `values` last saw it.
        self.register_buffer("activity", torch.zeros(64), persistent=False)

    def features(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the last layer reads, (N, 64), at least 0."""
        phase = t[:, None] / self.n_timesteps * torch.pi * torch.arange(8, device=t.device)
        seen = self.eye(x_t).mean((2, 3))
        return self.hidden(torch.cat([seen, phase.sin(), phase.cos()], dim=1)).relu()

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.out(self.features(x_t, t)).squeeze(1)


def new_value(policy) -> Value:
    """A critic for the policy's states; its weights are the same in all runs, whatever the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        critic = Value(policy.image_shape[0], len(policy.alpha_bar))
    return critic.to(policy.device)


@torch.no_grad()
def values(critic: Value, experience: Experience) -> torch.Tensor:
    """V of the states before every step, of all processes' samples, (T, N) float32."""
    trajectory, device = experience.trajectory, next(critic.parameters()).device
    states = zip(trajectory.states[:-1], trajectory.timesteps, strict=True)
    seen = [critic.features(x.to(device), t.to(device).expand(len(x))) for x, t in states]
    seen = parallel.gather(torch.stack(seen, dim=1))  # (N, T, 64)
    critic.activity.copy_(seen.mean((0, 1)) / (seen.mean() + 1e-8))
    return critic.out(seen).squeeze(-1).T.cpu()


def value_of(critic: Value, experience: Experience, step, sample) -> torch.Tensor:
    """V of the states in which decisions (step[u], sample[u]) were made, (U,), with gradient."""
    trajectory, device = experience.trajectory, next(critic.parameters()).device
    return critic(trajectory.states[step, sample].to(device), trajectory.timesteps[step].to(device))
