"""Classifier guidance: a policy whose noise prediction leans towards what a loss asks for.

It needs no training: `guide` returns a policy like any other, which `sampler` takes as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from ddpo_lib.encoders import Clip, embed_images, embed_texts
from ddpo_lib.policy import Policy, configuration, predict_noise

Loss = Callable[[torch.Tensor], torch.Tensor]
"""Images (N, C, H, W), about in [-1, 1], to (N,) differentiable numbers, low where as wished."""


def clip_distance(clip: Clip, prompt: str) -> Loss:
    """1 - cosine between the CLIP embeddings of an image and of the prompt, in [0, 2]."""
    text = embed_texts(clip, [prompt])[0].detach()
    return lambda images: 1 - embed_images(clip, images) @ text


def gradient(policy, loss: Loss, x_t, t, context=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a loss on the denoised image with respect to the noisy state.

    The loss sees x~_{t→0} (equation 2.25), not x_t: networks that were trained on images are
    blind in noise. So the gradient passes through the denoiser. x~ is not clamped, because a
    clamp passes no gradient at saturated pixels. Arguments as in `policy.transition`.

    Returns grad_{x_t} loss(x~_{t→0}) and, as it is there already, eps_theta(x_t, t); like x_t each.
    """
    # At high noise the derivative is a small difference of large terms, divided by a small
    # sqrt(alpha_bar_t). In bfloat16 it points elsewhere (cosine with float32's about 0.7).
    policy = replace(policy, bf16=False)
    a_t = policy.alpha_bar_at(t)
    with torch.enable_grad():  # samplers run without
        x_t = x_t.detach().requires_grad_()
        eps = predict_noise(policy, x_t, t, context)
        values = loss((x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt())
        n, shape = len(x_t), tuple(getattr(values, "shape", ()))
        if shape != (n,):
            raise ValueError(f"loss returned shape {shape} for {n} images: it must be shape ({n},)")
        if not values.requires_grad:
            advice = "compute them in torch, without detach or no_grad"
            raise ValueError(f"loss returned values without a gradient: {advice}")
        return torch.autograd.grad(values.sum(), x_t)[0], eps.detach()


def guide(policy: Policy, loss: Loss, scale: float) -> Policy:
    """The policy under classifier guidance (equation 2.23).

    With log p(y | x_t) = -loss, the guided score is the policy's minus scale · grad loss. A score
    is -eps / sqrt(1 - alpha_bar_t) (equation 2.21), so the guided policy predicts the noise

        eps_theta(x_t, t) + scale · sqrt(1 - alpha_bar_t) · grad_{x_t} loss(x~_{t→0}).

    The scale, gamma, is at least 0, which leaves the policy as it is, and at most a million. A
    prediction costs a backward pass, and memory for it: give the sampler a smaller `batch_size` for
    large networks.
    """
    if not 0 <= scale <= 1e6:
        raise ValueError(f"scale={scale}: gamma must be from 0 to 1e6; or negate the loss")
    # What takes the network's place gives eps, also where the network gives v.
    settings = configuration(policy.scheduler) | {"prediction_type": "epsilon"}
    return Policy(_Guided(policy, loss, scale), policy.scheduler.from_config(settings), bf16=False)


@dataclass(frozen=True)
class _Guided:
    """What a guided policy has in its network's place."""

    policy: Policy
    loss: Loss
    scale: float

    @property
    def config(self):
        return self.policy.unet.config

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> SimpleNamespace:
        grad, eps = gradient(self.policy, self.loss, x_t, t)
        towards = self.scale * (1 - self.policy.alpha_bar_at(t)).sqrt() * grad
        return SimpleNamespace(sample=eps + towards)
