"""Compile every kernel for a GPU that need not be there: python -m tests.compile_kernels 90. Prints shared memory."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_gsop.layers.kernels import covariance, norm_covariance, rescale, symmetric

SHARED = {80: 163, 86: 99, 89: 99, 90: 227}  # KB a program may have
POINTERS = dict(
    a="fp32", out="fp32", x="{half}", y="{half}", g="{half}", w="{half}", dx="{half}", dw="fp32", z="{half}",
    d="{half}", s="{half}", mean="fp32", var="fp32", weight="fp32", bias="fp32", products="fp32", sums="fp32",
    shift="fp32", parts="fp32", center="fp32", size="fp32",
)  # fmt: skip
FLOATS = ("shortcut", "scale", "eps", "N", "first")
CHANNELS_LAST = ("x_c", "z_c", "dx_c", "y_c", "d_c", "g_c", "w_c", "a_c")


def compile_for(kernel, capability: int, half: str, constants: dict, warps: int, stages: int = 3) -> int:
    signature, constexprs = {}, dict(constants)
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTERS[name.removesuffix("_ptr")].format(half=half)
        elif name in CHANNELS_LAST:
            signature[name], constexprs[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    index = kernel.arg_names.index
    aligned = [name for name, kind in signature.items() if kind == "i32" or kind.startswith("*")]
    attributes = {(index(name),): [["tt.divisibility", 16]] for name in aligned}  # as sizes are in practice
    source = ASTSource(kernel, signature, {(index(name),): v for name, v in constexprs.items()}, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(num_warps=warps, num_stages=stages))
    return compiled.metadata.shared


def main() -> None:
    capability = int(sys.argv[1])
    large = capability == 90
    cases = []
    for half in ("bf16", "fp16"):
        block = dict(BLOCK_C=128, BLOCK_M=32)
        cases += [(half, rescale._scale, block, 8, 3), (half, rescale._gradients, block, 8, 3)]
        for channels in (128, 256, 17):
            for norm in (True, False):
                single = channels <= 128
                sizes = dict(C=channels, NORM=norm, BLOCK_C=32 if channels == 17 else 128)
                block_m = (128 if single else 64) if large else 32
                forward = dict(sizes, SPLITS=1, SINGLE=single, BLOCK_M=block_m)
                cases.append((half, covariance._products, forward, 8, 3 if large else 2))
                backward = dict(sizes, OF_BATCH=True, BLOCK_M=64)
                backward.update({} if half == "fp16" else dict(size_ptr=None))
                backward.update({} if norm else dict(sums_ptr=None))
                cases.append((half, covariance._gradient, backward, 4, 1))
        cases.append((half, norm_covariance._statistics, block, 8, 3))
        cases.append((half, norm_covariance._combine, dict(BLOCK_C=16, BLOCK_P=64), 4, 3))
        cases.append((half, norm_covariance._normalization_gradient, block, 8, 3))
    cases.append(("bf16", symmetric._plus_transpose, dict(SIDE=64), 8, 3))
    for half, kernel, constants, warps, stages in cases:
        shared = compile_for(kernel, capability, half, constants, warps, stages)
        print(f"{kernel.__name__} {half} {constants}: {shared / 1024:.0f} KB")
        assert shared <= 1024 * SHARED[capability]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
