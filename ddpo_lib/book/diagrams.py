"""The diagrams, drawn from code in one style.

Every function returns a figure 7.4 inches wide. Colours say what a thing is: grey for states and
data, blue for the policy, orange for rewards (and injected noise), green for learning.
"""

from collections.abc import Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np

from ddpo_lib.book.shapes import (  # isort: skip
    BLUE, FAINT, FILL, GREEN, GREY, INK, ORANGE,
    arrow, box, canvas, check, circle, dots, picture, state, write,
)  # fmt: skip


def loop(pictures: np.ndarray | None = None, rewards: Sequence[float] | None = None) -> plt.Figure:
    """Figure 1.1: generate samples, score them, estimate the gradient, improve the policy, again.

    Of pictures, uint8 (n, H, W, 3), the first three are shown, with their rewards (n,).
    """
    check(pictures, "(n, H, W, 3)", 3, rewards)
    fig, ax = canvas(7.4, 2.65)
    gradient = r"$\hat{g} \approx \nabla_\theta\,\mathbb{E}[\,r(x_0)]$"
    step = r"$\theta \leftarrow \theta + \alpha\,\hat{g}$"
    generate = box(ax, 1.1, 2.1, "generate samples\n$x_0 \\sim p_\\theta$", BLUE)
    score = box(ax, 6.3, 2.1, "reward model\n$r(x_0)$", ORANGE)
    fit = box(ax, 6.3, 0.55, f"fit\n{gradient}", GREEN)
    improve = box(ax, 1.1, 0.55, f"improve the policy\n{step}", GREEN)
    if pictures is None:
        arrow(ax, generate, score, "samples")
    else:
        row = [picture(ax, 2.9 + 0.8 * i, 2.1, pictures[i]) for i in range(3)]
        arrow(ax, generate, row[0])
        arrow(ax, row[-1], score)
        for shape, reward in zip(row, [] if rewards is None else rewards, strict=False):
            write(ax, shape.x, 1.61, f"$r = {reward:.2f}$", 8, ORANGE)
    arrow(ax, score, fit, "rewards", (-0.36, 0), color=ORANGE)
    arrow(ax, fit, improve, "estimated gradient", color=GREEN)
    arrow(ax, improve, generate, "new weights", (0.46, 0), color=GREEN)
    write(ax, 3.7, 1.18, "again and again, each time with fresh samples", 8, FAINT)
    return fig


def reparameterisation() -> plt.Figure:
    """Figure 2.3: a random node stops the gradient; with the noise as an input it flows.

    Below, the same trick along the forward process: the noises of all its steps become one.
    """
    fig, ax = canvas(7.4, 4.2)
    small = {"width": 0.46, "height": 0.46, "size": 10}
    drawn = circle(ax, 1.85, 2.85, "$z$", ORANGE)
    computed = box(ax, 5.55, 2.85, "$z$", **small)
    for z, color in ((drawn, FAINT), (computed, GREEN)):
        phi = box(ax, z.x - 1.4, 3.4, r"$\phi$", **small)
        x = box(ax, z.x - 1.4, 2.3, "$x$", **small)
        f = box(ax, z.x + 1.4, 2.85, "$f$", **small)
        for start, end in ((phi, z), (x, z), (z, f)):
            arrow(ax, start, end)
        arrow(ax, z, phi, bend=0.35, color=color, linestyle="--")
        arrow(ax, z, x, bend=-0.35, color=color, linestyle="--")
        text = r"$\partial f / \partial z$"
        arrow(ax, f, z, text, (0, 0.13), bend=0.35, color=GREEN, linestyle="--")
    arrow(ax, circle(ax, computed.x, 3.62, r"$\epsilon$", ORANGE, 0.2), computed)
    ax.plot([1.23, 1.23], [3.38, 2.32], "x", color=INK, markersize=8, markeredgewidth=2)
    write(ax, drawn.x, 4.03, "random node: the gradient stops")
    write(ax, computed.x, 4.03, "noise as an input")
    write(ax, 2.35, 2.35, r"$z \sim q(z \mid \phi, x)$", 8, ORANGE)
    write(ax, 6.17, 3.64, r"$\epsilon \sim \mathcal{N}(0, I)$", 8, ORANGE)
    write(ax, 6.1, 2.35, r"$z = g(\phi, x, \epsilon)$", 8)
    write(ax, 4.95, 3.52, r"$\partial f / \partial \phi$", 8, GREEN)
    write(ax, 4.95, 2.18, r"$\partial f / \partial x$", 8, GREEN)

    ax.plot([0.2, 7.2], [1.87, 1.87], color=FILL[GREY], linewidth=1.5)
    x_0, x_1, x_t = (state(ax, x, 0.85, f"$x_{t}$") for x, t in ((0.9, 0), (2.75, 1), (6.45, "t")))
    arrow(ax, x_0, x_1)
    dots(ax, x_1, x_t)
    for end, noise in ((x_1, "0"), (x_t, "{t-1}")):
        arrow(ax, circle(ax, end.x - 0.75, 1.48, rf"$\epsilon_{noise}$", ORANGE, size=9), end)
    arrow(ax, x_0, x_t, bend=0.13, color=BLUE)
    formula = r"$x_t = \sqrt{\bar\alpha_t}\;x_0 + \sqrt{1 - \bar\alpha_t}\;\epsilon$"
    write(ax, 3.7, 0.22, f"in one step, with one noise:  {formula}", 9, BLUE)
    return fig


def ddim_chain(pictures: np.ndarray | None = None) -> plt.Figure:
    """Figure 2.7: a sampler that skips steps, and the forward process that allows it.

    Pictures, uint8 (4, H, W, 3), are the states from x_3 (noisy) to x_0.
    """
    check(pictures, "(4, H, W, 3)", 4)
    fig, ax = canvas(7.4, 2.15)
    images = [None] * 4 if pictures is None else pictures
    left = [state(ax, 0.45 + 0.88 * i, 1.0, f"$x_{3 - i}$", images[i]) for i in range(4)]
    right = [state(ax, 4.0 + 0.97 * i, 1.0, f"$x_{3 - i}$", images[i]) for i in range(4)]
    write(ax, 1.75, 2.0, "sampling that skips steps")
    write(ax, 1.77, 0.25, "two calls of the network instead of three", 8, FAINT)
    for a, b in pairwise(left):
        arrow(ax, a, b, color=FAINT, lw=0.8)
    for a, b, bend in ((0, 2, -0.35), (2, 3, -0.7)):
        text = rf"$p_\theta(x_{3 - b} \mid x_{3 - a})$"
        arrow(ax, (left[a].x, 1.31), (left[b].x, 1.31), text, bend=bend, color=BLUE)

    write(ax, 5.5, 2.0, "a forward process that is no chain")
    arrow(ax, right[3], right[2])
    for i in range(2):
        text = rf"$q_\sigma(x_{2 - i} \mid x_{3 - i}, x_0)$"
        arrow(ax, right[i], right[i + 1], text, (0, -0.13), bend=1.0)
        arrow(ax, (right[3].x, 1.31), (right[i].x, 1.31), bend=0.28)
    return fig


def mdp() -> plt.Figure:
    """Figure 3.1: the loop of agent and environment, and an episode of it unrolled."""
    fig, ax = canvas(7.4, 2.65)
    agent = box(ax, 1.25, 2.1, "agent\n$\\pi_\\theta(a_t \\mid s_t)$", BLUE, 1.6)
    world = box(ax, 1.25, 0.55, "environment\n$P(s_{t+1} \\mid s_t, a_t)$", width=1.6)
    arrow(ax, agent, world, "action\n$a_t$", (0.3, 0), bend=-0.85, color=BLUE)
    arrow(ax, world, agent, "state\n$s_{t+1}$", (-0.3, 0), bend=-0.85)
    arrow(ax, world, agent, "reward\n$r_t$", (0.3, 0), color=ORANGE)

    names = ("0", "1", "{T-1}", "T")
    row = [circle(ax, 3.55 + 1.15 * i, 0.65, f"$s_{name}$") for i, name in enumerate(names)]
    arrow(ax, box(ax, 2.8, 0.65, r"$\rho_0$", width=0.42, height=0.42), row[0])
    for name, (now, after) in zip(names[:-1], pairwise(row), strict=True):
        action = circle(ax, now.x + 0.3, 1.5, f"$a_{name}$", BLUE)
        reward = circle(ax, now.x + 0.3, 2.3, f"$r_{name}$", ORANGE)
        if name == "1":
            dots(ax, now, after)
            arrow(ax, action, ((now.x + after.x) / 2, now.y + 0.1))
        else:
            arrow(ax, action, after)
            arrow(ax, now, after, "$P$", (0, -0.13))
        arrow(ax, now, action, r"$\pi_\theta$", (0.19, -0.06), color=BLUE)
        arrow(ax, action, reward, color=ORANGE)
        arrow(ax, now, reward, bend=-0.32, color=ORANGE)
    write(ax, row[-1].x, 0.22, "end", 8, FAINT)
    return fig


def denoising_mdp(states: np.ndarray) -> plt.Figure:
    """Figure 4.1: one denoising trajectory as an episode; its only reward comes at the end.

    Of its states, uint8 (K + 1, H, W, 3) with K >= 4, noise first, the first two are shown, two
    neighbours after four fifths of the way, and the last.
    """
    check(states, "(K + 1, H, W, 3)", 5)
    K = len(states) - 1
    middle = min(4 * K // 5, K - 2)
    shown = states[[0, 1, middle, middle + 1, K]]
    s, x = ("0", "1", "t", "t+1", "T"), ("T", "T-1", "T-t", "T-t-1", "0")
    fig, ax = canvas(7.4, 2.05)
    places = (0.76, 2.46, 3.7, 5.4, 6.64)  # wide gaps for the arrows with their texts
    row = [picture(ax, x, 1.25, image, 0.84) for x, image in zip(places, shown, strict=True)]
    for i, now in enumerate(row):
        write(ax, now.x, 1.83, f"$s_{{{s[i]}}} = x_{{{x[i]}}}$", 10)
        text, width = ("$0$", 0.4) if i < 4 else ("$r(x_0)$", 0.7)
        arrow(ax, now, box(ax, now.x, 0.32, text, ORANGE, width, 0.36), color=ORANGE)
    for i in (0, 2):
        arrow(ax, row[i], row[i + 1], f"$a_{{{s[i]}}} = x_{{{x[i + 1]}}}$", color=BLUE)
        dots(ax, row[i + 1], row[i + 2], arrows=False)
        policy = rf"$\sim p_\theta(\,\cdot \mid x_{{{x[i]}}})$"
        write(ax, (row[i].x + row[i + 1].x) / 2, row[i].y - 0.15, policy, 8, BLUE)
    return fig


def reward_finetuning(
    states: np.ndarray | None = None, rewards: Sequence[float] | None = None
) -> plt.Figure:
    """Figure 4.2: collect trajectories with rewards, then update the policy from them, again.

    Of the first three trajectories of `states`, uint8 (K, N, H, W, 3), noise first, the first state
    is shown, one at two thirds, and the last; with their rewards, of (N,).
    """
    check(None if states is None else states[0], "(N, H, W, 3) at each of K steps", 3, rewards)
    fig, ax = canvas(7.4, 3.75)
    for x, width, title in ((2.43, 4.66, "1  collect"), (6.15, 2.3, "2  update")):
        box(ax, x, 2.05, "", GREY, width, 3.25, ec="none", fc="#f6f7f9", zorder=0)
        write(ax, x - width / 2 + 0.12, 3.5, title, 10, weight="bold", ha="left")
    policy = box(ax, 0.75, 2.1, "policy\n$p_\\theta(x_{t-1} \\mid x_t)$", BLUE, 1.1)
    for n in range(3):
        y = 3.0 - 0.9 * n
        images = [None] * 3 if states is None else states[[0, 2 * len(states) // 3, -1], n]
        row = [state(ax, 1.86 + 0.86 * i, y, f"$x_{'Tt0'[i]}$", images[i]) for i in range(3)]
        for a, b in pairwise([policy, *row]):
            arrow(ax, a, b, color=BLUE)
        text = f"$r_{n + 1}$" if rewards is None else f"${rewards[n]:.2f}$"
        arrow(ax, row[-1], box(ax, 4.38, y, text, ORANGE, 0.56, 0.36), color=ORANGE)
    write(ax, 2.8, 0.55, r"trajectories $\mathcal{D}^{\pi_\theta}$ with their rewards", 8, FAINT)

    formula = r"$\theta \leftarrow \theta + \alpha\,\hat{\nabla}_\theta\mathcal{J}$"
    advantage = box(ax, 6.15, 3.0, r"advantages $\hat{A}$", ORANGE, 1.8, 0.4)
    once = box(ax, 5.6, 2.1, "DDPO$_\\mathrm{SF}$\none update", GREEN, 0.98, 0.56, 8)
    often = box(ax, 6.7, 2.1, "DDPO$_\\mathrm{IS}$\nseveral, with $\\rho$", GREEN, 0.98, 0.56, 8)
    step = box(ax, 6.15, 1.1, formula, GREEN, 1.4, 0.45)
    arrow(ax, (4.66, 3.0), advantage, color=ORANGE)
    for loss in (once, often):
        arrow(ax, advantage, loss, color=GREEN)
        arrow(ax, loss, step, color=GREEN)
    arrow(ax, step, often, bend=0.8, color=GREEN, linestyle="--")
    ax.plot([step.x, step.x, policy.x], [0.85, 0.17, 0.17], color=GREEN, lw=1.2)
    arrow(ax, (policy.x, 0.17), policy, color=GREEN, shrinkA=0)
    write(ax, 3.7, 0.3, "new weights, and fresh trajectories for them", 8, GREEN)
    return fig
