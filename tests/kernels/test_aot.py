"""Every Triton kernel compiles ahead of time for every architecture, without a GPU, and keeps to its registers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vlmfast.kernels.aot import ARCHITECTURES, Usage

pytest.importorskip("triton")
USAGE = Usage("kernel", "plain bf16", 90, registers=200, spilled=0, shared=1024, matrix="wgmma", seconds=1.0)


@pytest.fixture(scope="module")
def table():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "vlmfast.kernels.aot", "--jobs", str(os.cpu_count())],
                         env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(table):
    assert re.search(r"^(\d+) compiled, 0 failed$", table, re.MULTILINE)
    for kernel in ("info_nce_fwd_kernel", "info_nce_fwd_merge_kernel", "info_nce_bwd_lines_kernel",
                   "info_nce_bwd_logits_kernel", "siglip_logits_kernel", "attention_fwd_kernel",
                   "attention_bwd_query_kernel", "attention_bwd_key_kernel", "attention_bwd_bias_kernel",
                   "attention_bwd_sum_kernel", "quantize_fwd_kernel", "quantize_bwd_kernel", "gumbel_noise_kernel",
                   "denoise_step_kernel", "diffusion_loss_kernel", "diffusion_loss_sum_kernel",
                   "diffusion_loss_bwd_kernel"):
        for arch in ARCHITECTURES:
            assert re.search(rf"^{kernel} .* {arch} +\d+ +0 ", table, re.MULTILINE), f"{kernel} sm_{arch}"


@pytest.mark.slow
@pytest.mark.parametrize("arch, instruction", [(80, "mma"), (90, "wgmma"), (100, "tcgen05")])
def test_16_bit_kernels_use_the_tensor_cores(table, arch, instruction):
    rows = re.findall(rf"^(?:info_nce_fwd_kernel|\w+_logits_kernel) .*(?:bf16|fp16) +{arch} .*$", table, re.MULTILINE)
    assert len(rows) == 20
    assert all(f" {instruction} " in row for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("arch, instruction", [(80, "mma"), (90, "wgmma"), (100, "tcgen05")])
def test_16_bit_attention_uses_the_tensor_cores(table, arch, instruction):
    pattern = rf"^attention_(?:fwd|bwd_query|bwd_key)_kernel .*(?:bf16|fp16) \d+ +{arch} .*$"
    rows = re.findall(pattern, table, re.MULTILINE)
    assert len(rows) == 45 and not any(" none " in row for row in rows), rows
    # tiles without options are large enough for the widest instruction, up to heads of 128
    plain = [row for row in rows if re.search(r" plain bf16 (64|128) ", row)]
    assert len(plain) == 6 and all(f" {instruction} " in row for row in plain), plain


def test_a_spill_is_a_problem():
    assert USAGE.problem == ""
    assert USAGE._replace(spilled=8).problem == "spills 8 bytes"


def test_too_much_shared_memory_is_a_problem():
    assert USAGE._replace(shared=200 << 10).problem == ""
    assert "shared memory" in USAGE._replace(shared=200 << 10, arch=80).problem


def test_refuses_to_run_where_the_interpreter_replaces_the_compiler():
    run = subprocess.run([sys.executable, "-m", "vlmfast.kernels.aot"], cwd=Path(__file__).parent, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True)
    assert run.returncode == 2
    assert "TRITON_INTERPRET" in run.stderr
