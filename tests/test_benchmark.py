"""The benchmarks run, compare like with like and print one JSON object."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from ddpo_lib.book import paths, profiles


@pytest.fixture
def benchmark(tmp_path):
    """benchmark("iteration", *arguments): what the script prints, run from elsewhere."""

    def run(name, *arguments):
        done = subprocess.run(
            [sys.executable, paths.ROOT / f"benchmarks/{name}.py", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_iteration_is_timed_and_the_gradients_agree(benchmark):
    result = benchmark("iteration", "--small", "--threads", "1")
    assert result["cosine"] >= 0.999
    assert result["straightforward_s"] > 0
    assert result["ours_s"] > 0
    speedup = result["straightforward_s"] / result["ours_s"]
    assert result["speedup"] == pytest.approx(speedup, rel=0.02)


def test_finetuning_killed_at_random_moments_is_the_same_to_the_bit(benchmark):
    result = benchmark("kill_anywhere", "--kills", "5", "--iterations", "40")
    assert result["kills"] == 5 and result["bit_for_bit"]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("kind", ["kill", "torn", "full", "read_only"])
def test_finetuning_that_meets_faults_of_the_disk_goes_on_to_the_bit(benchmark, kind):
    """At a few of its changes here; at all of them by the script itself."""
    result = benchmark("disk_faults", "--kinds", kind, "--every", "90")
    assert result["faults"] >= 2 and result["ended_it"] >= 2 and not result["wrong"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.getuid(), reason="mounts an image: Linux, root")
def test_power_cut_leaves_no_empty_file_and_the_finetuning_goes_on(benchmark):
    assert not benchmark("disk_faults", "--kinds", "power_cut")["wrong"]


def test_badly_drawn_compositions_are_found(benchmark):
    found = benchmark("hard_prompts", "--images", "1")
    assert found and max(found.values()) < 0.5


@pytest.mark.slow
def test_set_by_lot_is_what_the_script_finds(benchmark):
    loop = profiles.load("text").run("painter", "lot-ddpo").settings
    assert list(benchmark("hard_prompts")) == [*loop.prompts, *loop.unseen_prompts]
    assert len(loop.prompts) == len(loop.unseen_prompts)


def test_fidelity_is_measured(benchmark):
    result = benchmark("fidelity", "--profile", "smoke")
    assert result["jpeg"]["published"]["mean"] != result["jpeg"]["rescaled"]["mean"]
    assert 0 < result["jpeg"]["published_share_of_black_values"] < 1
    assert 0.5 < result["advantages"]["correlation"] < 1
    gradient = result["gradient"]
    assert gradient["last_sigmas"][-1] == 0
    assert gradient["norm_if_mean_over_t"] == pytest.approx(gradient["all_steps"]["norm"] / 3)
    updated = result["updated"]
    mean, total = (updated[f"median_abs_log_ratio_{kind}_over_pixels"] for kind in ("mean", "sum"))
    assert total == pytest.approx(3 * 64 * 64 * mean)
    assert updated["median_abs_log_ratio_of_last_step_floored"] > 1000 * mean


def test_batch_sizes_are_timed_and_change_no_image(benchmark):
    result = benchmark("sampling", "--turns", "1", "--images", "30", "--steps", "2")
    assert result["same_images"] and {*result["seconds"]} == {"100", "50", "25", "10"}


def test_toy_networks_are_timed_side_by_side(benchmark):
    result = benchmark("toy_network", "--small", "--repeats", "3")
    assert result["parameters_64"] <= 2.5e6
    for what in ("forward", "forward_backward"):
        ratio = result[f"{what}_64_s"] / result[f"{what}_32_s"]
        assert result[f"{what}_ratio"] == pytest.approx(ratio, rel=0.02)


def test_gpu_benchmark_has_every_part(benchmark):
    result = benchmark("gpu", "--small", "--repeats", "1")
    for loop in ("ours", "straightforward", "t4_setting"):
        assert result[loop]["iteration_s"] > 0
    ours = result["ours"]
    assert ours["iteration_s"] == pytest.approx(ours["rollout_s"] + ours["update_s"])
    assert result["share_of_matrix_rate"] > 0
    assert result["sampling"]["speedup"] > 0
    assert result["cosine"] > 0.99
    assert result["max_ratio_error_bf16"] < 1e-5 and result["max_ratio_error_fp32"] < 1e-5
