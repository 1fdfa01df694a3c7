"""What a run goes on from: last/ and best/ of its folder, each written whole or not at all."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ddpo_lib import adapter, disk, policy, runs
from ddpo_lib.policy import Policy


def save_last(home: Path, learner: Policy, optimizer, helpers, iterations_done: int) -> None:
    """Write last/: the policy, or its adapter alone, its helpers' learned weights (frozen ones come
    back from the pretrained policy), the optimizer's moments, the position, and a checksum of each
    file."""
    with disk.replacing_folder(home / "last") as draft:
        policy.save(learner, draft)
        moments = {
            f"{i}.{key}": value.contiguous()  # they are channels_last, as the weights are
            for i, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        save_file(moments, draft / "optimizer.safetensors")
        if helpers is not None:
            learned = [(name, p) for name, p in helpers.named_parameters() if p.requires_grad]
            weights = {name: p.detach().contiguous() for name, p in learned}
            save_file(weights, draft / "helpers.safetensors")
        sums = {f.relative_to(draft).as_posix(): disk.sha256(f) for f in sorted(draft.rglob("*.*"))}
        state = {"iterations_done": iterations_done, "sha256": sums}
        disk.write_json(draft / "state.json", disk.sealed(state))


def save_best(home: Path, learner: Policy, iteration: int, reward: float) -> None:
    """Write best/, a folder that plain diffusers loads, see `policy.save`, with its record."""
    with disk.replacing_folder(home / "best") as draft:
        policy.save(learner, draft)
        record = {"iteration": iteration, "reward": reward}
        disk.write_json(draft / "best.json", disk.sealed(record))


def restore_learner(home: Path, learner: Policy) -> None:
    """Put last/'s weights into the policy's network. ValueError if a file of last/ is damaged."""
    last = home / "last"
    with runs.whole(last, home):
        for name, known in disk.read_json(last / "state.json")["sha256"].items():
            if disk.sha256(last / name) != known:
                raise ValueError(f"{name} is not what was written")
        if adapter.is_in(learner.unet):
            adapter.restore(learner.unet, last)
        else:
            learner.unet.load_state_dict(policy.load(last, "cpu").unet.state_dict())


def restore(home: Path, optimizer: torch.optim.Optimizer, helpers: torch.nn.Module | None) -> None:
    """Put last/'s moments and helpers' weights back. ValueError if last/ is damaged."""
    with runs.whole(home / "last", home):
        state: dict[int, dict] = {}
        for name, value in load_file(home / "last" / "optimizer.safetensors").items():
            i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        if helpers is not None:
            helpers.load_state_dict(load_file(home / "last" / "helpers.safetensors"), strict=False)


def check_finite(learner: Policy, helpers: torch.nn.Module | None) -> None:
    """FloatingPointError for weights that are not finite: no checkpoint may be replaced by them."""
    for owner, network in {"": learner.unet, "the helpers' ": helpers}.items():
        weights = network.state_dict().items() if network is not None else ()
        if bad := [name for name, value in weights if not value.isfinite().all()]:
            said = f"weights that are not finite, such as {owner}{bad[0]}"
            raise FloatingPointError(f"{said}: lower the learning rate, or set bf16 to false")
