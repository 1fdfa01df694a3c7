"""A researcher without a checkout: the wheel, a script, a kill, and plain diffusers."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
from diffusers import DDIMPipeline

from ddpo_lib import policy as policies
from ddpo_lib import runs
from ddpo_lib.book import paths


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter whose only ddpo_lib is the built wheel's; what that needs is borrowed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = folder / "source"
    source.mkdir()
    for name in ("ddpo_lib", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", paths.ROOT / name, source], check=True)
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    site = next((folder / "venv").rglob("site-packages"))
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return folder / "venv/bin/python"


def environment():
    """Installed packages on the path, without the .pth file that leads to the checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DDPO")}
    return clean | {"PYTHONPATH": sysconfig.get_paths()["purelib"], "OMP_NUM_THREADS": "1"}


def run(python, folder, *arguments):
    return subprocess.run(
        [python, *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )


def readme_scripts():
    """README's blocks of Python, by the name in their first line."""
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(# (\S+\.py).*?)```", text, re.DOTALL)
    return {name: code for code, name in blocks}


def test_wheel_is_the_one_that_is_imported(python, tmp_path):
    done = run(python, tmp_path, "-c", "import ddpo_lib.book; print(ddpo_lib.__file__)")
    assert str(python.parents[1]) in done.stdout, done.stderr


def test_what_needs_the_checkout_says_so(python, tmp_path):
    for code in (
        "from ddpo_lib.book import profiles; profiles.load('toy')",
        "from ddpo_lib.book import paths; paths.RUNS",
    ):
        done = run(python, tmp_path, "-c", code)
        assert done.returncode and "checkout" in done.stderr.splitlines()[-1], done.stderr
    assert not list(tmp_path.iterdir())


def test_readme_script_is_killed_goes_on_and_plain_diffusers_loads_the_result(
    python, tmp_path, new_policy
):
    script = readme_scripts()["blue.py"]
    assert script.count("\n") <= 15
    (tmp_path / "blue.py").write_text(script)
    policies.save(new_policy(widths=(8,)), tmp_path / "data/toy/faces")
    home = tmp_path / "runs/blue"
    process = subprocess.Popen([python, "blue.py"], cwd=tmp_path, env=environment())
    while not (home / "last/state.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = runs.iterations_done(home)
    assert 1 <= done < 5

    again = run(python, tmp_path, "blue.py")
    assert again.returncode == 0, again.stderr
    assert runs.iterations_done(home) == 5
    assert [row["iteration"] for row in runs.metrics(home)] == list(range(6))
    pipeline = DDIMPipeline.from_pretrained(home / "best")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, num_inference_steps=4, output_type="np").images.shape == (2, 8, 8, 3)


def test_readme_objective_trains(python, tmp_path, new_policy):
    objective = readme_scripts()["my_objective.py"]
    assert objective.count("\n") <= 15
    (tmp_path / "my_objective.py").write_text(objective)
    script = readme_scripts()["blue.py"].replace('"ddpo"', '"my_objective"')
    (tmp_path / "blue.py").write_text(script)
    policies.save(new_policy(widths=(8,)), tmp_path / "data/toy/faces")
    done = run(python, tmp_path, "blue.py")
    assert done.returncode == 0, done.stderr
    rows = runs.metrics(tmp_path / "runs/blue")
    assert len(rows) == 6 and all(row["kl"] >= 0 for row in rows[1:])
