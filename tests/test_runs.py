"""A run's folder: settings, rows, checkpoints, and what a crash leaves behind."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch

from ddpo_lib import config, paths, runs
from ddpo_lib import policy as policies


def test_folder_is_named_after_profile_policy_task_and_seed(new_run):
    assert runs.folder(new_run(seed=4)) == paths.RUNS / "test/tiny-brighter-s4"


def test_settings_hold_everything_that_decides_the_run(new_run):
    run = new_run(eta=0.5)
    stored = json.loads((runs.open_folder(run) / "settings.json").read_text())
    assert stored["sha256"]["policy"] == runs.fingerprint(run.source)
    assert stored["settings"] == dataclasses.asdict(run.settings)
    assert stored["reward"] == "own_rewards:brightness"


def test_changed_setting_sets_the_old_folder_aside(new_run, capsys):
    run = new_run()
    home = runs.open_folder(run)
    (home / "metrics.csv").write_text("old\n")
    assert runs.open_folder(run) == home
    assert (home / "metrics.csv").exists()

    assert runs.open_folder(config.replace(run, eta=0.5)) == home
    assert not (home / "metrics.csv").exists()
    aside = home.with_name("tiny-brighter-s0.old1")
    assert (aside / "metrics.csv").read_text() == "old\n"
    assert "settings changed (eta 1.0 → 0.5)" in capsys.readouterr().out

    runs.open_folder(config.replace(run, eta=0.7))
    assert (aside / "metrics.csv").read_text() == "old\n"
    assert home.with_name("tiny-brighter-s0.old2").exists()


def test_run_goes_on_under_other_memory_settings_and_after_an_update_of_the_library(new_run):
    home = runs.open_folder(new_run(micro_batch=3))
    (home / "metrics.csv").write_text("old\n")
    runs.open_folder(new_run(micro_batch=1, gradient_checkpointing=True))
    # A setting that the library did not have then: the run had what is its default now.
    stored = json.loads((home / "settings.json").read_text())
    del stored["settings"]["timestep_fraction"]
    runs.write_json(home / "settings.json", stored)
    runs.open_folder(new_run())
    assert (home / "metrics.csv").read_text() == "old\n"
    runs.open_folder(new_run(timestep_fraction=0.5))
    assert not (home / "metrics.csv").exists()


@pytest.mark.parametrize("retrained", ["policy", "reward", "other reward"])
def test_retrained_weights_set_the_old_folder_aside(new_run, new_policy, tmp_path, retrained):
    model = tmp_path / "aesthetic"
    models = dataclasses.replace(new_run().models, aesthetic=str(model))
    reward = "over50" if retrained == "other reward" else "aesthetic"
    run = dataclasses.replace(new_run(), models=models, reward=reward)
    policies.save(new_policy(seed=0), model)
    home = runs.open_folder(run)
    runs.open_folder(run)
    aside = home.with_name("tiny-brighter-s0.old1")
    assert not aside.exists()
    policies.save(new_policy(seed=9), run.source if retrained == "policy" else model)
    runs.open_folder(run)
    assert aside.exists() == (retrained != "other reward")


def test_second_process_waits_until_the_first_is_done(new_run, capsys):
    run, order = new_run(), []

    def second():
        with runs.hold(run):
            order.append("second")

    thread = threading.Thread(target=second)
    with runs.hold(run):
        thread.start()
        thread.join(timeout=1.5)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]
    assert "another process is at work on it" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["runs", "runs/test", "runs/test/tiny-brighter-s0"])
def test_unwritable_folder_is_one_clear_error(new_run, where):
    """A file stands in the folder's place, which stops even the superuser."""
    run = new_run()
    obstacle = paths.RUNS.parent / where
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write the run's folder .*tiny-brighter-s0: .*DDPO"):
        runs.open_folder(run)


def test_fingerprint_follows_the_weights(new_policy, tmp_path):
    policies.save(new_policy(seed=0), tmp_path / "a")
    policies.save(new_policy(seed=0), tmp_path / "b")
    policies.save(new_policy(seed=1), tmp_path / "c")
    a, b, c = (runs.fingerprint(str(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert runs.fingerprint(str(tmp_path / "nothing")) is None


def test_rows_are_appended_and_dropped(tmp_path):
    file = tmp_path / "metrics.csv"
    runs.append_rows(file, [{"iteration": 0, "x": 1.5}, {"iteration": 1, "x": 2.5}])
    runs.append_rows(file, [{"iteration": 10, "x": 3.5}])
    assert file.read_text().split() == ["iteration,x", "0,1.5", "1,2.5", "10,3.5"]
    runs.drop_rows(file, 2)
    assert file.read_text().split() == ["iteration,x", "0,1.5", "1,2.5"]
    runs.append_rows(file, [{"iteration": 2, "x": 4.5}])
    assert file.read_text().split()[-1] == "2,4.5"
    runs.drop_rows(file, 0)
    assert not file.exists()
    runs.drop_rows(file, 0)
    assert not list(tmp_path.iterdir())


def test_a_crash_while_rows_are_dropped_loses_none(tmp_path, monkeypatch):
    file = tmp_path / "metrics.csv"
    runs.append_rows(file, [{"iteration": i, "x": i} for i in range(4)])
    before = file.read_text()

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.os, "replace", crash)
        runs.drop_rows(file, 2)
    assert file.read_text() == before
    runs.drop_rows(file, 2)
    assert file.read_text().split() == ["iteration,x", "0,0", "1,1"]


def train_a_little(policy, optimizer):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 700])
    optimizer.zero_grad()
    policy.unet(x, t).sample.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_checkpoint_continues_to_the_bit(new_policy, tmp_path, layout):
    """Also in the layout that policies have on a GPU."""

    def new_optimizer(policy):
        return torch.optim.AdamW(policy.unet.parameters(), lr=1e-2)

    policy = new_policy()
    policy.unet.to(memory_format=layout)
    optimizer = new_optimizer(policy)
    train_a_little(policy, optimizer)
    train_a_little(policy, optimizer)
    runs.save_checkpoint(tmp_path, policy, optimizer, {"iterations_done": 2})

    again = policies.load(tmp_path / "last", device="cpu", bf16=False)
    again.unet.to(memory_format=layout)
    optimizer_again = new_optimizer(again)
    assert runs.load_checkpoint(tmp_path, optimizer_again) == {"iterations_done": 2}
    train_a_little(policy, optimizer)
    train_a_little(again, optimizer_again)

    pairs = zip(policy.unet.parameters(), again.unet.parameters(), strict=True)
    assert all(ours.equal(theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("name", ["last", "best"])
def test_crash_between_the_two_renames_of_a_replacement_is_mended(
    new_run, new_policy, monkeypatch, name
):
    run = new_run()
    home = runs.open_folder(run)
    first, second = new_policy(seed=1), new_policy(seed=2)
    optimizer = torch.optim.AdamW(first.unet.parameters())

    def save(policy):
        if name == "best":
            runs.save_best(home, policy)
        else:
            train_a_little(first, optimizer)
            runs.save_checkpoint(home, policy, optimizer, {})

    save(first)
    before = runs.fingerprint(str(home / name / "unet"))
    rename = Path.rename

    def crash(self, target):
        if self.name == f"{name}.tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", crash)
        save(second)
    assert not (home / name).exists()

    runs.open_folder(run)
    assert runs.fingerprint(str(home / name / "unet")) == before
    save(second)
    after = policies.load(home / name, device="cpu").unet.state_dict()
    assert all(after[key].equal(value) for key, value in second.unet.state_dict().items())


def test_json_is_written_all_or_nothing(tmp_path):
    file = tmp_path / "state.json"
    runs.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
