"""apelr: training and writing, against the source (APEL-R) and, planner against none, against the baseline."""

import argparse
import functools
import importlib
import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

import train_apelr
from benchmarks import racing
from benchmarks.racing import (
    Trainer,
    absent,
    alternate,
    both_ways,
    in_turns,
    peer_name,
    pool,
    race,
    report,
    report_share,
    zipf_tokens,
)
from common.products import float32_products
from common.runtime import Runtime
from measure.speed import flops_per_token
from measure.writing import generate

MODELS = {
    "baseline": {"version": "baseline"},
    "v1": {"version": "v1_filtered_mixture"},
    "v2": {"version": "v2_planner_required"},
    "v2 bias": {"version": "v2_planner_required", "experts": "bias"},
    "v2 lowrank": {"version": "v2_planner_required", "experts": "lowrank"},
}
TERMS = {  # our name: (the source's, weight)
    "v1": {
        "belief_entropy": ("belief_entropy", 0.01),
        "usage_kl": ("usage_kl_to_uniform", 0.01),
        "chunk_bow": ("chunk_bow_loss", 0.1),
        "plan_mi": ("plan_mi", 0.01),
        "chunk_post_kl": ("chunk_post_kl", 0.01),
    },
    "v2": {
        "boundary_entropy": ("boundary_entropy", 0.01),
        "usage_balance": ("usage_kl_to_uniform", 0.01),
        "future_contrastive": ("future_contrastive_loss", 0.1),
        "plan_js_div": ("plan_js_div_loss", 0.01),
        "rep_unlikelihood": ("rep_unlikelihood_loss", 0.1),
    },
}
BATCH = 8  # windows a step
MIDDLE = (2_048, 8, 128, 256)  # V, K, L, H
ONE_BY_ONE = (MIDDLE, (128, 8, 128, 256), (8_192, 8, 128, 256), (2_048, 4, 128, 256), (2_048, 16, 128, 256),
              (2_048, 8, 512, 256), (2_048, 8, 128, 768))
GRID = tuple(itertools.product((128, 2_048, 8_192), (4, 8, 16), (128, 512), (256, 768)))


def bench(options: argparse.Namespace) -> None:
    """The source at equal precision, writing, and the planner against the plain softmax of the same shape.

    Shapes of the last: around V = 2048, K = 8, L = 128, H = 256 one changes at a time (V 128, 8192; K 4, 16; L 512;
    H 768); --full is the whole grid. They train on the likelihood alone, in fp32 (bf16 on a GPU), 8 windows a step.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = options.peer and str(options.peer / "src")
    if not source:
        absent("apelr source", "--peer=PATH of a checkout with src/apelr")
    against_source(source, device)
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        for line in worker.submit(measure_writing, source, device, racing.SHORT).result():
            report(*line)
    for shape in GRID if options.full else ONE_BY_ONE:
        against_baseline(shape, device)


def against_source(source: str | None, device: str) -> None:
    """Every auxiliary term on, the source's boundaries and lookahead; V = 2048, K = 8, L = 128, H = 256, batch 8."""
    for precision in ("fp32", "bf16"):
        sides = {"ours": "", "every token": "the same, plan_mi and plan_js_div on every token instead of a quarter"}
        if source:
            peer = {source: f"APEL-R source in {precision}"}
            sides |= both_ways(peer, train_apelr.Config(device=device)) if precision == "fp32" else peer
        for version in TERMS:
            race(ApelrTrainer, sides, (version, *MIDDLE, True, precision, device), BATCH * MIDDLE[2],
                 f"apelr {version}, all terms, {precision} {device}", memory=True)


def against_baseline(shape: tuple, device: str) -> None:
    where = "V {} K {} L {} H {}".format(*shape)
    found = {}
    for side, one in alternate(ApelrTrainer, list(MODELS), ("", *shape, False, "auto", device), rounds=3).items():
        found[side] = one["seconds"].rate(BATCH * shape[2])
        name = f"apelr {side}, {where}"
        report_share(name, found[side], one)
        if side != "baseline":
            report(name, found[side], "tokens/s", "the baseline", found["baseline"])
        report(f"{name}, peak memory", one["memory"], "MB")


def settings_of(side: str, version: str, V: int, K: int, L: int, H: int, terms: bool, precision: str, device: str):
    """Config of a model of train_apelr.py in this shape."""
    weights = {ours: weight for ours, (_, weight) in TERMS[version].items()} if terms else {}
    named = {"belief_entropy": "entropy_reg_weight", "usage_kl": "usage_balance_weight"}
    if version == "v1":
        weighted = {named.get(name, f"{name}_weight"): weight for name, weight in weights.items()}
    else:
        weighted = {"loss_weights": weights} if version == "v2" else {}
    return train_apelr.Config(
        **MODELS[version], **weighted, vocab_size=V, num_plan_states=K, token_dim=256, dropout=0.1, d_model=H,
        fusion_dim=H, seq_len=L, precision=precision, device=device, rep_window=32, compat="source" if terms else "",
        aux_token_fraction=1.0 if side == "every token" else 0.25)


def source_model(path: str, version: str, V: int, K: int, L: int, H: int, *rest, token_dim: int = 256
                 ) -> torch.nn.Module:
    """The source's model of this shape, from the folder that holds its package."""
    sys.path.insert(0, path)
    shape = {"vocab_size": V, "num_plan_states": K, "token_dim": token_dim, "hidden_dim": H, "dropout": 0.1}
    if version == "v1":
        source = importlib.import_module("apelr.model")
        return source.APELRModel(source.APELRModelConfig(fusion_dim=H, **shape))
    source = importlib.import_module("apelr.model_v2")
    return source.APELRV2Model(source.APELRV2ModelConfig(num_experts=K, **shape))


class ApelrTrainer(Trainer):
    """train_apelr.py, or the source where side is the path it is in, on tokens as frequent as words."""

    def __init__(self, side: str, version: str, *shape):
        V, _, L, _, _, precision, device = shape
        self.version, self.device = version or side, torch.device(device)
        self.draw = pool(zipf_tokens(V, BATCH, L + 1, self.device))
        if Path(side).is_absolute():
            path = peer_name(side, train_apelr.Config(device=device))
            self.model = source_model(path, self.version, *shape).to(self.device)
            self.autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=precision == "bf16")
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        else:
            self.take_ours(settings_of(side, self.version, *shape))
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def take_ours(self, cfg: train_apelr.Config) -> None:
        self.rt, steps = Runtime(cfg).__enter__(), itertools.count()
        rt = self.rt
        self.model = train_apelr.build_model(cfg).to(self.device)
        trained, optimizer = rt.wrap(self.model), rt.adamw(train_apelr.parameter_groups(self.model, cfg), lr=1e-3)

        def step() -> None:
            train_apelr.train_step(trained, self.draw(), next(steps), rt, cfg)
            rt.step(optimizer, self.parameters, cfg.grad_clip, 1e-3)

        self.step = step

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of the source, which leaves adding up its terms to its loop."""
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.version == "v1":
            total, terms = self.model.filtered_nll(inputs, targets)
        else:
            total, terms = self.model.compute_losses(inputs, targets, rep_unlikelihood_window=32)
        for ours, (name, weight) in TERMS[self.version].items():
            sign = -1 if ours in train_apelr.MAXIMISED else 1
            total = total + sign * weight * terms[name]
        return total

    def flops_per_token(self) -> float:
        return flops_per_token(self.model)


def write_as_source(peer: torch.nn.Module, version: str, count: int) -> None:
    with float32_products("highest", torch.device("cpu"), are_small=True):  # as torch has them
        if version == "v1":
            peer.generate_filtered(list(range(8)), count)
        else:
            peer.generate_planned(list(range(8)), count)


def measure_writing(source: str | None, device: str, short: bool, count: int = 128) -> list[tuple]:
    """128 tokens after a prompt of 8; V = 2048, K = 8, H = 256, fp32. The source writes one text at a time."""
    torch.set_flush_denormal(True)
    racing.SHORT = short
    found = []
    for version in TERMS:
        shape = (version, *MIDDLE, True, "fp32", device)
        cfg = settings_of("ours", *shape)
        model = train_apelr.build_model(cfg).to(device)
        with Runtime(cfg) as rt:
            runs = {}
            for batch in (1, 8, 64):
                prompt = torch.arange(8, device=device).expand(batch, -1)
                runs[batch] = functools.partial(generate, model, prompt, count, rt.generator())
            half = functools.partial(generate, head_type=torch.bfloat16)  # sample.py --precision=bf16
            runs["bf16 heads"] = functools.partial(half, model, prompt[:1], count, rt.generator())
            if source:
                peer = source_model(source, *shape).to(device)
                runs["source"] = functools.partial(write_as_source, peer, version, count)
            times = in_turns(runs, device)
        name = f"apelr {version} writing, batch"
        one = times[1].rate(count)
        for batch in (1, 8, 64):
            against = ("batch 1", one) if batch > 1 else ()
            found.append((f"{name} {batch} {device}", times[batch].rate(batch * count), "tokens/s", *against))
        for side, text in ((1, f"{name} 1 {device}"), ("bf16 heads", f"{name} 1, bf16 heads {device}")):
            if source:
                against = "APEL-R source in fp32", times["source"].rate(count)
                found.append((text, times[side].rate(count), "tokens/s", *against))
    return found
