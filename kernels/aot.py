"""Ahead-of-time compilation of every Triton kernel, without a GPU: `python -m vlmfast.kernels.aot [family ...]`.

Compiles each variant that the families list to machine code for compute capability 8.0, 9.0 and 10.0, prints its
registers, spills and shared memory, and exits with 1 if one does not compile, spills or needs more shared memory than
the architecture has.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # compute capability: bytes of shared memory per block


class Variant(NamedTuple):
    """One kernel with its constants; a family lists its own in `aot_variants(capability)`."""

    label: str
    kernel: object
    # argument: Triton type, or a named tuple of types, of None for what is left out and of integers for known values;
    # every argument not listed is a float32 pointer
    types: Mapping[str, str | tuple[str | int | None, ...]]
    aligned: Collection[str]  # integers (fields of a tuple too) divisible by 16 (pointers always are)
    constants: Mapping[str, object]
    options: Mapping[str, int]


class Usage(NamedTuple):
    kernel: str
    label: str
    arch: int
    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per block
    matrix: str  # instruction that multiplies matrices: mma, wgmma, tcgen05 or none
    seconds: float

    @property
    def problem(self) -> str:
        if self.spilled:
            return f"spills {self.spilled} bytes"
        limit = ARCHITECTURES[self.arch]
        return f"needs more than {limit} bytes of shared memory" if self.shared > limit else ""


def compile_variant(family: str, index: int, arch: int) -> Usage:
    """Compiles the family's variant of this index to machine code and reads what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = _variants(family, arch)[index]
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        kind = variant.types.get(name, "*fp32")
        if name in variant.constants:
            kind, constants[position,] = "constexpr", variant.constants[name]
        elif isinstance(kind, tuple):
            known = {field: part for field, part in kind._asdict().items() if not isinstance(part, str)}
            constants |= {(position, kind._fields.index(field)): part for field, part in known.items()}
            kind = kind._replace(**dict.fromkeys(known, "constexpr"))
        signature[name] = kind
        leaves = zip(kind._fields, kind, strict=True) if isinstance(kind, tuple) else ((name, kind),)
        for at, (leaf, part) in enumerate(leaves):
            if part.startswith("*") or leaf in variant.aligned:
                path = (position, at) if isinstance(kind, tuple) else (position,)
                attributes[path] = [["tt.divisibility", 16]]
    start = time.perf_counter()
    source = ASTSource(variant.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
    seconds = time.perf_counter() - start
    registers, spilled = _resources(compiled.asm["cubin"])
    matrix = re.search(r"\b(tcgen05|wgmma|mma)\.", compiled.asm["ptx"])
    return Usage(variant.kernel.__name__, variant.label, arch, registers, spilled, compiled.metadata.shared,
                 matrix[1] if matrix else "none", seconds)


def _variants(family: str, arch: int) -> list[Variant]:
    return importlib.import_module(f"vlmfast.kernels.{family}").aot_variants(arch)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread of a cubin with one kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True,
                              text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], max(found["STACK"], found["LOCAL"])


def main(arguments: list[str] | None = None) -> int:
    from vlmfast.kernels import FAMILIES

    parser = argparse.ArgumentParser(prog="python -m vlmfast.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="family")
    parser.add_argument("--jobs", type=int, default=1, help="compile this many variants at once")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    unknown = sorted(set(options.families) - set(FAMILIES))
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")

    print(f"{'kernel':28} {'variant':20} {'arch':>4} {'registers':>9} {'spilled':>7} {'shared':>7} {'matrix':>7} "
          f"{'seconds':>7}")
    failures = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        tasks = [(variant, arch, pool.submit(compile_variant, family, index, arch)) for family in options.families
                 for arch in ARCHITECTURES for index, variant in enumerate(_variants(family, arch))]
        for variant, arch, task in tasks:
            name = f"{variant.kernel.__name__:28} {variant.label:20} {arch:4}"
            try:
                usage = task.result()
            except Exception as error:
                failures += 1
                reason = str(error).strip().splitlines() or [type(error).__name__]
                print(f"{name} FAILED: {reason[-1]}", flush=True)
                continue
            failures += bool(usage.problem)
            print(f"{name} {usage.registers:9} {usage.spilled:7} {usage.shared:7} {usage.matrix:>7} "
                  f"{usage.seconds:7.1f}{' FAILED: ' if usage.problem else ''}{usage.problem}", flush=True)
    print(f"{len(tasks)} compiled, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
