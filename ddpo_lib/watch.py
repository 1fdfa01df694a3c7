"""What goes wrong in a finetuning without an error: images become alike, the policy runs away."""

COLLAPSED = 0.5
"""Share of the pretrained policy's Vendi score or spread under which images have become alike."""
DIVERGED = 1000.0
"""KL in nats per trajectory between a rollout's policy and what the updates make of it, above which
the rollout says nothing about them any more."""


def warnings(rows: list[dict]) -> list[str]:
    """Of `runs.metrics`, what the last iteration is the first to show."""
    first, before, last, said = rows[0], rows[-2], rows[-1], []
    for name, title in {"vendi": "Vendi score", "spread": "spread"}.items():
        start, old, new = (row.get(f"stochastic_{name}") for row in (first, before, last))
        if None not in (start, old, new) and new < COLLAPSED * start <= old:
            fall = f"the training sampler's {title} fell from {start:.2f} to {new:.2f}"
            said.append(f"{fall}: its images become alike")
    if (last.get("kl") or 0) > DIVERGED >= (before.get("kl") or 0):
        said.append(f"KL {last['kl']:.0f} nats: the policy runs away, lower the learning rate")
    return said
