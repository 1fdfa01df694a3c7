"""A run's folder: identity, metrics, checkpoints, and what a crash leaves behind."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpo_lib import checkpoints, disk, identity, runs
from ddpo_lib import policy as policies
from ddpo_lib.settings import Finetune

SETTINGS = Finetune()
IDENTITY = {"policy": "abc", "reward": {"name": "r", "fingerprint": "def"}, "seed": 0,
            "settings": SETTINGS.decisive}  # fmt: skip


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "runs" / "mine"
    runs.open_folder(home, IDENTITY, SETTINGS)
    return home


def changed(**changes):
    return IDENTITY | {"settings": IDENTITY["settings"] | changes}


# ------------------------------------------------------------------------------- identity


def test_same_run_is_returned_to(home):
    (home / "mine.txt").write_text("kept")
    runs.open_folder(home, IDENTITY, Finetune(micro_batch=3))
    assert (home / "mine.txt").exists()
    assert json.loads((home / "settings.json").read_text())["settings"]["micro_batch"] == 3


@pytest.mark.parametrize(
    "identity, message",
    [
        (changed(eta=0.5), "settings.eta 1.0 → 0.5"),
        (IDENTITY | {"seed": 1}, "seed 0 → 1"),
        (IDENTITY | {"policy": "xyz"}, "policy abc → xyz"),
        (IDENTITY | {"reward": {"name": "r", "fingerprint": "xyz"}}, "reward.fingerprint def"),
    ],
)
def test_other_run_is_refused_and_nothing_changes(home, identity, message):
    before = (home / "settings.json").read_text()
    with pytest.raises(ValueError, match=message):
        runs.open_folder(home, identity, Finetune(micro_batch=3))
    assert (home / "settings.json").read_text() == before
    assert not list(home.parent.glob("mine.*"))


def test_setting_that_is_younger_than_the_run_had_its_default(home):
    stored = json.loads((home / "settings.json").read_text())
    del stored["identity"]["settings"]["timestep_fraction"]
    disk.write_json(home / "settings.json", stored)
    runs.open_folder(home, IDENTITY, SETTINGS)
    disk.write_json(home / "settings.json", stored)
    with pytest.raises(ValueError, match="timestep_fraction 1.0 → 0.5"):
        runs.open_folder(home, changed(timestep_fraction=0.5), SETTINGS)


@pytest.mark.parametrize("name", ["last", "best", "metrics.jsonl"])
def test_folder_without_settings_is_not_adopted(home, name):
    (home / name).mkdir()
    (home / "settings.json").unlink()
    with pytest.raises(ValueError, match="no run: settings.json is missing"):
        runs.open_folder(home, IDENTITY, SETTINGS)


def test_second_process_waits_until_the_first_is_done(tmp_path, capsys):
    home, order = tmp_path / "mine", []

    def second():
        with disk.locked(home):
            order.append("second")

    thread = threading.Thread(target=second)
    with disk.locked(home):
        thread.start()
        thread.join(timeout=1.5)
        order.append("first")
        busy = pytest.raises(RuntimeError, match="another process is at work")
        with busy, disk.locked(home, limit=1):
            pass
    thread.join(timeout=10)
    assert order == ["first", "second"]
    assert "another process is at work on it" in capsys.readouterr().out


def test_lock_has_a_word_and_a_limit(tmp_path, capsys):
    """Nothing waits without saying so, and what takes a moment does not wait for ever."""
    file, held = tmp_path / "manifest.json", threading.Event()

    def keep():
        with disk.locked(file):
            held.set()
            done.wait(10)

    done = threading.Event()
    thread = threading.Thread(target=keep)
    thread.start()
    held.wait(10)
    busy = pytest.raises(
        RuntimeError, match="manifest.json: another process is at work on it: wait"
    )
    with busy, disk.locked(file, limit=1.1):
        pass
    done.set()
    thread.join()
    assert "manifest.json: another process is at work on it; waiting" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["runs", "runs/mine"])
def test_unwritable_folder_is_one_clear_error(tmp_path, where):
    """A file stands in the folder's place, which stops even the superuser."""
    obstacle = tmp_path / where
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("in the way")
    home = tmp_path / "runs/mine"
    refused = pytest.raises(OSError, match=r"cannot write .*mine: ")
    with refused, disk.locked(home):
        runs.open_folder(home, IDENTITY, SETTINGS)


# ------------------------------------------------------------------------------- metrics


def test_metrics_are_one_line_an_iteration(tmp_path):
    assert runs.metrics(tmp_path) == []
    rows = [{"iteration": i, "reward_mean": i / 3, "rewards": [0.1] * i} for i in range(4)]
    for row in rows:
        runs.append_metrics(tmp_path, row)
    assert runs.metrics(tmp_path) == rows
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("torn", range(1, 25))
def test_line_that_a_crash_cut_short_is_made_again(tmp_path, torn):
    """At whatever byte: also where the stump reads as a whole number of an earlier iteration."""
    for i in (0, 1, 2):
        runs.append_metrics(tmp_path, {"iteration": i, "x": 12.5})
    line = json.dumps({"iteration": 3, "x": 12.5})
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + line[:torn])
    assert [row["iteration"] for row in runs.metrics(tmp_path)] == [0, 1, 2]
    runs.drop_after(tmp_path, 2)
    runs.append_metrics(tmp_path, {"iteration": 3, "new": True})
    assert [row["iteration"] for row in runs.metrics(tmp_path)] == [0, 1, 2, 3]
    assert runs.metrics(tmp_path)[3] == {"iteration": 3, "new": True}


def test_damage_in_the_middle_is_named_and_not_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{"iter\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged"):
        runs.metrics(tmp_path)


def last_of(home, done, **best):
    """last/ and best/ as far as the folder's check looks."""
    for name, content in {
        "last/state.json": {"iterations_done": done, "sha256": {}},
        "best/best.json": {"iteration": 0, "reward": 0.5} | best,
    }.items():
        (home / name).parent.mkdir(exist_ok=True)
        disk.write_json(home / name, disk.sealed(content))


@pytest.mark.parametrize(
    "lines, whole",
    [
        ((0, 1, 2, 3), True), ((0, 1, 2, 3, 4), True),  # the last is a crash's, and made again
        ((0, 1, 2), False), ((0, 1, 3), False), ((1, 2, 3), False), ((), False),
        ((0, 1, 2, 3, 4, 5), False), ((0, 1, 2, 2, 3), False),
    ],
)  # fmt: skip
def test_lines_that_are_missing_are_noticed(home, lines, whole):
    for i in lines:
        runs.append_metrics(home, {"iteration": i})
    last_of(home, 3)
    if whole:
        return runs.open_folder(home, IDENTITY, SETTINGS)
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: .*last/ holds 3 .*put back"):
        runs.open_folder(home, IDENTITY, SETTINGS)


@pytest.mark.parametrize("n_lines, whole", [(0, True), (1, True), (2, True), (3, False)])
def test_lost_last_is_noticed(home, n_lines, whole):
    """A crash before the first checkpoint leaves no more than two lines."""
    for i in range(n_lines):
        runs.append_metrics(home, {"iteration": i})
    if whole:
        return runs.open_folder(home, IDENTITY, SETTINGS)
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: .*last/ holds 0 iterations"):
        runs.open_folder(home, IDENTITY, SETTINGS)


@pytest.mark.parametrize("damage", ["missing", "iteration", "reward"])
def test_best_that_is_missing_or_changed_is_named_at_once(home, damage):
    for i in (0, 1):
        runs.append_metrics(home, {"iteration": i})
    last_of(home, 1)
    file = home / "best/best.json"
    if damage == "missing":
        file.unlink()
    else:
        disk.write_json(file, json.loads(file.read_text()) | {damage: 7})
    with pytest.raises(ValueError, match=r"best is damaged .*Put back a copy of it or, to start"):
        runs.open_folder(home, IDENTITY, SETTINGS)


def test_one_changed_digit_of_the_position_is_noticed(home):
    last_of(home, 12)
    assert runs.iterations_done(home) == 12
    file = home / "last/state.json"
    file.write_text(file.read_text().replace('"iterations_done": 12', '"iterations_done": 13'))
    with pytest.raises(ValueError, match="last is damaged .*not what was written"):
        runs.iterations_done(home)


def test_older_records_have_no_checksum(home):
    """And are read as they are."""
    (home / "last").mkdir()
    disk.write_json(home / "last/state.json", {"iterations_done": 3})
    assert runs.iterations_done(home) == 3


@pytest.mark.parametrize("name", ["last", "best"])
def test_link_in_a_checkpoints_place_is_refused(home, tmp_path, name):
    """Its target would lose the checkpoint's name at the next replacement."""
    (tmp_path / "elsewhere").mkdir()
    (home / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name}'\] are links, .*: put the folder itself there"):
        runs.open_folder(home, IDENTITY, SETTINGS)


def test_truncated_development_set_is_named(home):
    pictures = np.zeros((1, 2, 2, 3), np.uint8)
    for i in range(2):
        runs.save_development(home, i, {"development": (pictures, np.zeros(1))})
    file = home / "development/001.npz"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"001.npz is damaged \(BadZipFile"):
        runs.development(home)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    """JSON has none."""
    row = {"iteration": 0, "kl": float("nan"), "updates": [{"loss": float("-inf"), "rate": 1e-7}]}
    runs.append_metrics(tmp_path, row)
    disk.write_json(tmp_path / "x.json", row)
    expected = {"iteration": 0, "kl": None, "updates": [{"loss": None, "rate": 1e-7}]}
    for text in ((tmp_path / "metrics.jsonl").read_text(), (tmp_path / "x.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail) == expected


def test_drafts_of_killed_processes_go_and_those_of_others_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".{dead.pid}-x.json", f".{os.getppid()}-x.json", f".{dead.pid}-y.json", ".a-x.json"]
    for name in names:
        (tmp_path / name).write_text("half")
    disk.write_json(tmp_path / "x.json", {})
    assert {file.name for file in tmp_path.iterdir()} == {"x.json", *names[1:]}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_error_of_the_disk_says_where_and_what_to_do(tmp_path, monkeypatch, number):
    """Whatever is written: JSON, a table, a picture, a model card."""
    (tmp_path / "x").write_text("old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    outside = disk.explained(tmp_path.parent)  # says nothing again
    with pytest.raises(OSError) as caught, outside, disk.replacing(tmp_path / "x") as draft:
        draft.write_text("new")
    said = str(caught.value)
    assert said.startswith(f"cannot write {tmp_path}: ") and os.strerror(number) in said
    assert said.count("free some space") == 1 and "\n" not in said
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "old")]


def test_what_comes_after_the_checkpoint_is_dropped(tmp_path):
    (tmp_path / "development").mkdir()
    for i in (0, 2, 12, 999, 1000, 1001):
        runs.append_metrics(tmp_path, {"iteration": i})
        pictures = np.full((2, 4, 4, 3), i % 256, np.uint8)
        runs.save_development(tmp_path, i, {"development": (pictures, np.full(2, i))})
    runs.drop_after(tmp_path, 1000)
    assert [row["iteration"] for row in runs.metrics(tmp_path)] == [0, 2, 12, 999, 1000]
    pictures, scores = runs.development(tmp_path)
    assert scores[:, 0].tolist() == [0, 2, 12, 999, 1000]  # in order, also beyond 999
    assert pictures[:, 0, 0, 0, 0].tolist() == [0, 2, 12, 999 % 256, 1000 % 256]
    runs.drop_after(tmp_path, -1)
    assert runs.metrics(tmp_path) == [] and not list((tmp_path / "development").iterdir())


def test_crash_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    for i in range(4):
        runs.append_metrics(tmp_path, {"iteration": i})

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", crash)
        runs.drop_after(tmp_path, 2)
    assert len(runs.metrics(tmp_path)) == 4


@pytest.mark.parametrize("function", ["write_json", "save_development"])
def test_files_are_written_all_or_nothing(tmp_path, function):
    (tmp_path / "development").mkdir()
    pictures = np.zeros((1, 2, 2, 3), np.uint8)
    if function == "write_json":
        disk.write_json(tmp_path / "state.json", {"a": 1})
        with pytest.raises(TypeError):
            disk.write_json(tmp_path / "state.json", {"a": object()})
        assert json.loads((tmp_path / "state.json").read_text()) == {"a": 1}
        assert len(list(tmp_path.iterdir())) == 2
    else:
        runs.save_development(tmp_path, 0, {"development": (pictures, np.zeros(1))})
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(np, "savez_compressed", half_written)
            runs.save_development(tmp_path, 0, {"development": (pictures, np.ones(1))})
        assert [file.name for file in (tmp_path / "development").iterdir()] == ["000.npz"]
        assert runs.development(tmp_path)[1].tolist() == [[0.0]]


def half_written(stream, **arrays):
    stream.write(b"half")
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------- checkpoints


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
    checkpoints.save_last(tmp_path, policy, optimizer, None, 2)

    again = new_policy()
    again.unet.to(memory_format=layout)
    checkpoints.restore_learner(tmp_path, again)
    optimizer_again = new_optimizer(again)
    checkpoints.restore(tmp_path, optimizer_again, None)
    assert runs.iterations_done(tmp_path) == 2
    train_a_little(policy, optimizer)
    train_a_little(again, optimizer_again)

    pairs = zip(policy.unet.parameters(), again.unet.parameters(), strict=True)
    assert all(ours.equal(theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("name", ["last", "best"])
def test_crash_between_the_two_renames_of_a_replacement_is_mended(
    home, new_policy, monkeypatch, name
):
    first, second = new_policy(seed=1), new_policy(seed=2)
    optimizer = torch.optim.AdamW(first.unet.parameters())

    def save(policy):
        if name == "best":
            checkpoints.save_best(home, policy, 1, 0.5)
        else:
            checkpoints.save_last(home, policy, optimizer, None, 1)

    def kept():
        return identity.fingerprint(policies.load(home / name, device="cpu"))

    train_a_little(first, optimizer)
    for i in (0, 1):
        runs.append_metrics(home, {"iteration": i})
    checkpoints.save_best(home, first, 0, 0.5)
    save(first)
    before = kept()
    rename = Path.rename

    def crash(self, target):
        if self.name == f"{name}.tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", crash)
        save(second)
    assert not (home / name).exists()

    runs.open_folder(home, IDENTITY, SETTINGS)
    assert kept() == before
    save(second)
    assert kept() == identity.fingerprint(second) != before
    assert not (home / f"{name}.previous").exists()


def test_runs_are_read_without_torch(tmp_path):
    """The batch looks at them before anything runs."""
    code = "import sys; from ddpo_lib import runs, settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
