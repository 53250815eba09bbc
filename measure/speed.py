"""What a device can do: the rate of its matrix products, batches that fit into its memory, and a model's arithmetic."""

import time

import numpy as np
import torch

RATE_SECONDS = 0.2  # of measuring; the median of at least three products
RATE_SIZE = 1024  # of their matrices on a CPU


def matmul_rate(rt) -> float:
    """FLOP/s that large matrix products reach on this device in this precision: what a model's are held against."""
    size = 8192 if rt.device.type == "cuda" else RATE_SIZE
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(rt.precision, torch.float32)
    a, b = torch.ones(2, size, size, device=rt.device, dtype=kind)
    rates = []
    end = time.perf_counter() + RATE_SECONDS
    while len(rates) < 3 or time.perf_counter() < end:
        rt.synchronize()
        began = time.perf_counter()
        a @ b
        rt.synchronize()
        seconds = time.perf_counter() - began
        rates.append(2 * size**3 / seconds)  # a multiplication and an addition each
    return float(np.median(rates))


def fitting_batch_size(rt, model: torch.nn.Module, cfg, loss_of) -> int:
    """What batch_size=auto comes to: on a GPU the most windows a micro-step that leave the rest of its memory free.

    Probed with a forward and a backward pass of loss_of(size), from batch_size_min at doubling sizes up to
    batch_size_cap, in batch_size_safety of the memory; every rank takes the smallest of all. Without a GPU it is
    cpu_batch_size. Reads these and grad_accum of cfg.
    """
    parts = rt.world_size * cfg.grad_accum
    if rt.device.type != "cuda":
        return max(1, cfg.cpu_batch_size // parts) * parts
    size = cfg.batch_size_min
    total = torch.cuda.get_device_properties(rt.device).total_memory
    weights = sum(p.numel() for p in model.parameters())
    optimizer_bytes = 8 * weights  # AdamW's two moments in float32, which the first step makes
    while size < cfg.batch_size_cap:
        larger = min(2 * size, cfg.batch_size_cap)
        try:
            torch.cuda.reset_peak_memory_stats(rt.device)
            loss_of(larger).backward()
            peak = torch.cuda.max_memory_allocated(rt.device) + optimizer_bytes
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        if peak > cfg.batch_size_safety * total:
            break
        size = larger
    return min(rt.gather(size)) * parts


def flops_per_token(model) -> float:
    """6 x weights of matrix products + full attention, the convention of PaLM (Chowdhery et al. 2022).

    Of a model of train_apelr.py. The head of every plan counts: experts that read an input a plan (version 1) use
    theirs once a plan.
    """
    heads, bias = model.experts.table()
    products = sum(weight.numel() for weight in model.backbone.parameters() if weight.ndim == 2)
    if hasattr(model.experts, "state_proj"):
        products += model.experts.state_proj.weight.numel() + len(bias) * heads.numel()
    else:
        products += heads.numel()
    layers = len(getattr(model.backbone, "layers", ()))  # of attention
    attention = 2 * layers * model.cfg.seq_len * model.cfg.d_model  # queries x keys, and weights x values
    return 6.0 * (products + attention)  # 2 FLOPs forward, 4 backward
