"""The benchmark runs, compares like with like and prints one JSON object."""

import json
import os
import subprocess
import sys

import pytest

from ddpo_lib import paths


def test_benchmark_prints_one_json_object_and_the_gradients_agree(tmp_path):
    done = subprocess.run(
        [sys.executable, paths.ROOT / "benchmarks/iteration.py", "--small", "--threads", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(paths.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["cosine"] >= 0.999
    assert result["straightforward_s"] > 0
    assert result["ours_s"] > 0
    speedup = result["straightforward_s"] / result["ours_s"]
    assert result["speedup"] == pytest.approx(speedup, rel=0.02)
