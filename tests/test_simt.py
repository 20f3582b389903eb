"""The SIMT runtime that executes the CUDA kernels without a GPU: its self-test, in every build and order of threads."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "simt"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]
VARIANTS = {"plain": ["-O2"], "sanitized": SANITIZE, "ucontext": ["-O2", "-DFRACTAL_SIMT_UCONTEXT"]}
ORDERS = ("forward", "backward", "random:7")

# A check that is renamed or lost in the program must be so here too.
CHECKS = """
    block_sum_32 block_sum_96 block_sum_1024 indices shuffles votes halves_of_a_warp counting_barriers maths last_block
    elements no_false_alarm large_shared statistics order bad_order
    deep_stacks stacks_of_failed_threads rounding_stays_with_its_thread os_threads
    race_write_write race_write_then_read race_read_then_write race_two_readers_one_writes race_across_warps
    race_outside_the_mask race_in_a_byte race_of_a_word_and_a_byte race_in_a_wide_element
    out_of_bounds out_of_bounds_below misaligned uninitialised uninitialised_in_later_block
    barrier_not_reached barrier_after_early_exit barriers_of_two_kinds barrier_against_shuffle collectives_of_two_masks
    syncwarp_after_exit shuffle_after_exit shuffle_outside_mask shuffle_outside_block shuffle_from_outside shuffle_width
    bad_launch_0 bad_launch_1 bad_launch_2 bad_launch_3 bad_launch_4 bad_launch_5 bad_launch_6 bad_launch_7
    bad_launch_8 bad_launch_9 bad_launch_10 nested_launch outside_a_kernel exception
""".split()


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or ""]
    if not shutil.which(compiler[0]):
        reason = "the SIMT self-test needs a C++ compiler: set CXX, or install g++"
        print(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("simt")
    command = [*compiler, "-std=c++17", "-Wall", "-Wextra", "-pthread", "-DFRACTAL_SIMT", f"-I{HERE}"]

    def build(variant: str) -> subprocess.CompletedProcess[str]:
        return run([*command, *VARIANTS[variant], str(HERE / "selftest.cpp"), "-o", str(folder / variant)])

    with ThreadPoolExecutor(2) as pool:
        for variant, done in zip(VARIANTS, pool.map(build, VARIANTS), strict=True):
            assert done.returncode == 0, f"{variant}:\n{done.stderr}"
    return {variant: str(folder / variant) for variant in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_selftest(programs: dict[str, str], variant: str) -> None:
    bits = set()
    for order in ORDERS:
        done = run([programs[variant]], FRACTAL_SIMT_ORDER=order)
        lines = done.stdout.splitlines()
        assert done.returncode == 0 and not done.stderr, f"{order}:\n{done.stdout}{done.stderr}"
        assert {line[3:] for line in lines if line.startswith("ok ")} == set(CHECKS), order
        bits.add("\n".join(line for line in lines if line.startswith("bits ")))
    assert len(bits) == 1 and bits != {""}, "the result depends on the order of threads"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("heap", "heap-buffer-overflow"),
        ("stack", "stack-buffer-overflow"),
        ("integer", "signed integer overflow"),
    ],
)
def test_sanitizers_see_into_kernels(programs: dict[str, str], rule: str, words: str) -> None:
    done = run([programs["sanitized"], rule])
    assert done.returncode != 0 and words in done.stderr, done.stderr
