"""Which library of the two in torch makes float32 products on a CPU: the faster one, at the precision asked for.

torch asks MKL, and oneDNN where less than full precision will do (medium, see torch.set_float32_matmul_precision). On
AMD's processors with AVX-512 MKL makes do with AVX2, and oneDNN takes half its time. Less precise products oneDNN has
only with AMX, which these processors lack: those that are asked for as medium are there of full precision, as `exact`
proves by one. So on these processors oneDNN is always asked: steps of the pages take 0.5 to 0.9 of the time.

Attention is then not the fused one of CPUs, which would ask oneDNN for each of its many products of 32 rows and take 3
to 15 times as long. The plain one holds [B, heads, T, T] weights: from some thousand tokens on that is much memory.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch

_cuda = torch.backends.cuda  # whose switches of attention are those of CPUs too
# The newer names of the precision, one a library, where this torch has them.
NEWER = [library for library in (_cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
         if hasattr(library, "fp32_precision")]


def read_precision() -> tuple[str, ...]:
    """That of float32 products by its older name, which stands for all libraries, and by the newer ones.

    torch refuses the older name where a program has set newer ones to something else, which then are what counts.
    """
    newer = [library.fp32_precision for library in NEWER]
    try:
        return torch.get_float32_matmul_precision(), *newer
    except RuntimeError:
        return "highest", *newer


def write_precision(precision: str, *newer: str) -> None:
    torch.set_float32_matmul_precision(precision)  # the newer ones too
    for library, its_own in zip(NEWER, newer, strict=False):
        library.fp32_precision = its_own


SWITCHES = (
    (read_precision, lambda precision: write_precision(*precision)),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    # Plain attention in bfloat16 under autocast, as the fused one has it, and not by way of float32.
    (_cuda.fp16_bf16_reduction_math_sdp_allowed, _cuda.allow_fp16_bf16_reduction_math_sdp),
)
AS_TORCH_HAS_THEM = [read() for read, _ in SWITCHES[1:]]


@contextlib.contextmanager
def float32_products(precision: str, device: torch.device, are_small: bool = False) -> Iterator[None]:
    """Products of float32 matrices at torch's precision highest, high or medium; what was before is put back.

    Args:
        are_small: below some 10^6 multiplications, as of a batch of one: a call of oneDNN costs more than they do.
    """
    by_onednn = device.type == "cpu" and exact() and not are_small
    before = [read() for read, _ in SWITCHES]
    now = [("medium",), False, True] if by_onednn else [(precision,), *AS_TORCH_HAS_THEM]
    try:
        for (_, write), value in zip(SWITCHES, now, strict=True):
            write(value)
        yield
    finally:
        for (_, write), value in zip(SWITCHES, before, strict=True):
            write(value)


@functools.cache
def exact() -> bool:
    """Whether this processor is one where oneDNN's products are the faster ones, and all of full precision."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    if not str(known.get("cpu_name")).startswith("AMD") or not known.get("avx512_f") or known.get("amx_tile"):
        return False
    before = read_precision()
    write_precision("medium")
    # Factors that bfloat16 and TF32 round to 1: 12 digits of each would be lost.
    factor = 1 + 2**-12
    row = torch.full((256, 64), factor)
    try:
        return bool(((row @ row.t()) / 64 - factor**2).abs().max() < 1e-6)
    finally:
        write_precision(*before)
