"""Compiles the Triton kernels for GPUs that need not be there, and prints what the assembler says.

python -m benchmarks.gpu_compile --size 32
"""

import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu import attention, convolution, dropout, gated, gated_step, mixture, norm, step

TARGETS = 80, 90, 100  # ten times the compute capabilities
# Tensor-core instructions: of every architecture, of Hopper, of Blackwell.
SHORT = {"mma.sync": "mma", "wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05"}
PRODUCTS = "|".join(map(re.escape, SHORT))
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Arguments that are numbers, and tensors that are float32 whatever the type of the others is.
INTEGERS = "L", "H", "D", "N", "R", "W", "K", "rows", "size"
NUMBERS = {"EPSILON": "fp32", "scale": "fp32", "threshold": "i64"}
TENSORS = {"steps_back": "*i64", "position": "*i64", "keys": "*i32", "values": "*u8"}
FLOAT32 = {
    "sums", "gradient_sums", "scales", "S", "Z", "weight", "bias", "means", "inverses", "d_weight",
    "d_bias", "residual", "normed", "d_residual", "log_probs", "d_log_probs", "kept",
}  # fmt: skip
REGISTERS = 65536  # of a multiprocessor
COLUMNS = {
    "registers": "registers of a thread",
    "blocks": "blocks that fit the registers",
    "spilled": "bytes spilled",
    "shared": "bytes of shared memory",
    "products": "tensor-core instructions",
}


def list_kernels(E: int, n_heads: int = 8) -> Iterator[tuple]:
    """Kernels, the types of their inputs, their constants and the compiler's options."""
    norms = norm.sizes(n_heads * E)
    backward = {**norms, "PER_PROGRAM": norm.ROWS_OF_A_PROGRAM}
    convolutions = {"OFFSETS": (1, 2, 3, 92, 95, 98), **convolution.SIZES}  # of 32x32 colour images
    gradients = {**convolutions, "PER_PROGRAM": convolution.POSITIONS_OF_A_PROGRAM}
    for dtype in TYPES:
        for kernel in (
            attention.sum_chunks, attention.attend, attention.sum_gradients, attention.backpropagate
        ):  # fmt: skip
            yield kernel, dtype, attention.sizes(E, dtype), attention.OPTIONS
        yield step.read_position, dtype, step.sizes(E), step.OPTIONS
        yield from list_gated(E, dtype)
        yield norm.add_norm, dtype, norms, norm.OPTIONS
        yield norm.add_norm_backward, dtype, backward, norm.OPTIONS
        for kernel in (dropout.relu_drop, dropout.relu_drop_backward):
            yield kernel, dtype, {"BLOCK": dropout.BLOCK}, dropout.OPTIONS
        for kernel in (mixture.mixture_log_prob, mixture.mixture_backward):
            yield kernel, dtype, mixture.sizes(10), mixture.OPTIONS
        yield convolution.convolve, dtype, convolutions, convolution.OPTIONS
        yield convolution.weight_gradient, dtype, gradients, convolution.OPTIONS
        steps = {"T": 6, "COLUMNS": convolution.SIZES["COLUMNS"]}
        yield convolution.convolve_position, dtype, steps, convolution.STEP_OPTIONS


def list_gated(E: int, dtype: torch.dtype) -> Iterator[tuple]:
    """Those of gated attention, if they are for heads of size E."""
    if E not in gated.SIZES:
        return
    for kernel in (
        gated.gated_sum_chunks, gated.gated_attend, gated.gated_sum_gradients,
        gated.gated_backpropagate,
    ):  # fmt: skip
        yield kernel, dtype, gated.sizes(E, dtype), gated.OPTIONS
    carry = {"E": E, "TILE": gated.TILE, "BACKWARD": True}
    if dtype == torch.float32:  # as the states always are
        yield gated.gated_carry, dtype, carry, gated.CARRY_OPTIONS
    yield gated_step.gated_position, dtype, {"E": E}, gated_step.step_options(E)


def compile_kernel(kernel, dtype: torch.dtype, constants: dict, options: dict, target: int) -> dict:
    """Registers of a thread, bytes it spills, shared memory (bytes), blocks whose registers fit a
    multiprocessor, and tensor-core instructions of a kernel."""
    signature = {name: argument_type(name, dtype, constants) for name in kernel.arg_names}
    # As torch's tensors are, and as rows of `projected` are wide if 8 divides the heads.
    aligned = [
        i
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name == "W" and kind == "i32")
    ]
    aligned = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx = compiled.asm["ptx"]
    report = assemble(ptx, target)
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return {
        "registers": registers,
        "blocks": REGISTERS // (registers * 32 * options["num_warps"]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "shared": compiled.metadata.shared,
        "products": describe_products(re.findall(PRODUCTS, ptx)),
    }


def argument_type(name: str, dtype: torch.dtype, constants: dict) -> str:
    """In Triton's words."""
    if name in constants:
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    tensor = "*fp32" if name in FLOAT32 else f"*{TYPES[dtype]}"
    return NUMBERS.get(name) or TENSORS.get(name) or tensor


def assemble(ptx: str, target: int) -> str:
    """What the assembler in Triton's package reports."""
    name = "ptxas-blackwell" if target >= 100 else "ptxas"
    # Triton's PTX uses the instructions of one architecture alone ("a") if there are such.
    architecture = f"sm_{target}a" if target >= 90 else f"sm_{target}"
    command = [Path(nvidia.__file__).parent / "bin" / name, "-v", "--gpu-name", architecture]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command += [source, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def describe_products(found: list[str]) -> str:
    """The number of each instruction: "40 mma"."""
    counts = {name: found.count(name) for name in sorted(set(found))}
    return " and ".join(f"{n} {SHORT[name]}" for name, n in counts.items()) or "none"


def measure(kernels: Iterable[tuple], targets: Iterable[int] = TARGETS) -> Iterator[dict]:
    """A record of each of `list_kernels` for every target."""
    for kernel, dtype, constants, options in kernels:
        for target in targets:
            record = compile_kernel(kernel, dtype, constants, options, target)
            yield {"kernel": kernel.__name__, "type": TYPES[dtype], "target": target, **record}


def main(argv: list[str] | None = None) -> int:
    """One line for each kernel and type."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="of the heads")
    targets = ", ".join(f"sm_{target}" for target in TARGETS)
    print(f"On {targets}:\n\n| kernel | {' | '.join(COLUMNS.values())} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for kernel in list_kernels(parser.parse_args(argv).size):
        records = list(measure([kernel]))
        cells = [", ".join(str(record[name]) for record in records) for name in COLUMNS]
        print(f"| {records[0]['kernel']}, {records[0]['type']} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
