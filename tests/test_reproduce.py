"""`make` starts the batch, and no signal to it leaves anything running."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ddpo_lib.book import paths, reproduce

BATCH = """
import subprocess, sys, time
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
ignore = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
deaf = [sys.executable, "-c", ignore]
started = [
    subprocess.Popen(sleeper), subprocess.Popen(sleeper, start_new_session=True),
    subprocess.Popen(deaf, start_new_session=True),
]
time.sleep(0.5)
print(*(each.pid for each in started), flush=True)
time.sleep(600)
"""


@pytest.fixture
def started(tmp_path):
    """A make whose recipe runs a batch; the pids of what that has started, a kernel that minds no
    signal among them."""
    (tmp_path / "batch.py").write_text(BATCH)
    (tmp_path / "recipe.py").write_text(
        "import sys\nfrom ddpo_lib.book import reproduce\nreproduce.PATIENCE = 1\n"
        "try:\n    sys.exit(reproduce.run([sys.executable, sys.argv[1]]))\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    recipe = f"run:\n\t@{sys.executable} {tmp_path}/recipe.py {tmp_path}/batch.py\n"
    (tmp_path / "Makefile").write_text(recipe)
    make = subprocess.Popen(
        ["make", "--no-print-directory", "-f", tmp_path / "Makefile", "run"], cwd=paths.ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    pids = [int(pid) for pid in make.stdout.readline().split()]
    assert len(pids) == 3 and all(map(psutil.pid_exists, pids))
    yield make, [psutil.Process(pid) for pid in pids]
    for pid in pids:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "name, to_group",
    [("SIGINT", True), ("SIGHUP", True), ("SIGTERM", True), ("SIGTERM", False), ("SIGKILL", False)],
)
def test_no_signal_leaves_anything_running(started, name, to_group):
    """To the group as a terminal does it, to make alone as a job scheduler."""
    make, family = started
    (os.killpg if to_group else os.kill)(make.pid, getattr(signal, name))
    assert make.wait(20) != 0
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(alive, family)):
        time.sleep(0.1)
    assert not any(map(alive, family))


def alive(process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_stopped_batch_says_that_what_is_done_is_kept(monkeypatch, capsys, name):
    """The batch itself sends the signal, as its first and last act."""
    code = f"import os, signal, time; os.kill(os.getppid(), signal.{name}); time.sleep(600)"
    monkeypatch.setattr(sys, "argv", ["reproduce", "smoke"])
    monkeypatch.setattr(reproduce.batch, "plan", lambda *_: "a plan")
    monkeypatch.setattr(reproduce, "snakemake", lambda *_: [sys.executable, "-c", code])
    before = [signal.getsignal(each) for each in reproduce.SIGNALS]
    try:
        with pytest.raises(SystemExit) as ended:
            reproduce.main()
    finally:
        for each, handler in zip(reproduce.SIGNALS, before, strict=True):
            signal.signal(each, handler)
    assert ended.value.code == 130
    assert (
        "Stopped. What is done is kept; start it again, and it goes on." in capsys.readouterr().out
    )


@pytest.mark.parametrize("status", [0, 3])
def test_status_is_the_batchs(status):
    assert reproduce.run([sys.executable, "-c", f"import sys; sys.exit({status})"]) == status


def test_batch_is_snakemake_on_the_profile():
    command = reproduce.snakemake("smoke", 2, "--", "seeds")
    assert command[1:3] == ["-m", "snakemake"] and command[-2:] == ["--", "seeds"]
    assert "profile=smoke" in command and "--nolock" in command


def test_profile_that_is_not_there_starts_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "ddpo_lib.book.reproduce", "nope"], cwd=paths.ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Nothing was done: unknown profile 'nope'")
