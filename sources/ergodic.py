"""Synthetic documents of K hidden Markov components, with the exact optimum for every subset of them."""

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace

import h5py
import numpy as np
import torch

from common.errors import DataError
from sources.chunks import ChunkSpool
from sources.processes import Process, ProcessError, make_process
from sources.shared import SPLITS, Workshop, progress


def ergodic_components(components: list[dict]) -> tuple[list[str], list]:
    """Names and processes of the zoo, all over the same vocabulary; raises DataError for what cannot be."""
    names, parts = [], []
    for i, component in enumerate(components):
        if not isinstance(component, dict):
            raise DataError(f"components[{i}] = {component!r}: expected {{'process': NAME, ...}}")
        if odd := {"initial_state", "add_bos"} & component.keys():
            raise DataError(f"components[{i}]: chunks begin anywhere in a document, so {odd.pop()} cannot be set")
        names.append(str(component.get("name", f"{component.get('process')}-{i}")))
        parts.append({k: v for k, v in component.items() if k not in ("name", "weight")})
    if len(set(names)) != len(names) or not names:
        raise DataError(f"components are named {names}: name at least one, and each differently")
    try:
        found = [make_process("nonergodic", components=[part]) for part in parts]
    except ProcessError as e:
        raise DataError(str(e)) from e
    top = max(process.vocab_size for process in found)

    def widen(p):
        T = torch.nn.functional.pad(p.transition_matrices, (0, 0, 0, 0, 0, top - p.vocab_size))  # tokens it never emits
        return Process(T, p.initial_state, p.normalizing_eigenvector, p.stationary_state, p.name)

    return names, list(map(widen, found))


def oracle_xe(log_prob: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy by position of the exact predictors: (of the uniform mixture, of the known component), [K, n] each.

    The mixture predicts p(x_t | x_<t) = sum_k w_k p_k(x_t | x_<t) with w_k the posterior of component k given x_<t.

    Args:
        log_prob: log p_k(x_t | x_<t) in nats, [N, K, n]. owner: the true component [N].
    """
    mixture = mixture_log_prob(log_prob)
    known = np.take_along_axis(log_prob, owner[:, None, None], 1)[:, 0]
    return tuple(np.stack([-x[owner == k].mean(0) for k in range(log_prob.shape[1])]) for x in (mixture, known))


def mixture_log_prob(log_prob: np.ndarray) -> np.ndarray:
    """log p(x_t | x_<t) under the uniform mixture, [N, n], from log p_k(x_t | x_<t) [N, K, n]."""
    total = np.logaddexp.reduce(np.cumsum(log_prob, -1, dtype=np.float64), axis=1)  # log sum_k p_k(x_1 .. x_t)
    return np.diff(total, axis=-1, prepend=np.log(log_prob.shape[1]))


def draw(process, cfg, count: int, counter: tuple, text: str) -> Iterator[torch.Tensor]:
    """count documents of a component, a thousand at a time, a pure function of (seed, counter)."""
    state = np.random.SeedSequence(cfg.seed, spawn_key=counter).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    for begin in progress(range(0, count, 1_000), text, "kdoc"):
        yield process.sample(min(1_000, count - begin), cfg.chunks_per_document * cfg.chunk_size, generator)


COMPONENTS = [
        {"name": "sticky", "process": "mess3", "x": 0.05, "a": 0.85, "vocab_map": [0, 1, 2]},
        {"name": "restless", "process": "mess3", "x": 0.2, "a": 0.9, "vocab_map": [0, 1, 2]},
        {"name": "shifted", "process": "mess3", "x": 0.05, "a": 0.85, "vocab_map": [1, 2, 3]},
        {"name": "golden", "process": "no_consecutive_ones", "p": 0.5, "vocab_map": [0, 3]},
    ]


def ergodic(*, components: list[dict] = COMPONENTS, train_documents: int = 10_000, validation_documents: int = 1_000,
            test_documents: int = 0, chunks_per_document: int = 2, chunk_size: int = 100, out_dir: str =
            "data/ergodic", seed: int = 1337) -> dict:
    """Documents of K components in the layout of `arxiv`, with the oracles of every chunk of validation and test.

    Each document is one sequence of its component. Oracles read a chunk from its first token on, as a model does:
    oracle_log_prob [N, K, n] is log p_k(x_t | x_<t), from which the optimum of any subset of components follows;
    oracle_xe_mixture and oracle_xe_component [K, n] are its averages for all components together.
    """
    cfg = SimpleNamespace(**locals())
    names, processes = ergodic_components(cfg.components)
    n, vocab_size = cfg.chunk_size, processes[0].vocab_size
    done = {}
    with Workshop(cfg.out_dir) as shop:
        for s, split in enumerate(SPLITS):
            count = getattr(cfg, f"{split}_documents")
            if not count:
                continue
            log_prob, rows = [], []
            with contextlib.closing(ChunkSpool(shop.folder, split, n, vocab_size)) as chunks:
                for k, (name, process) in enumerate(zip(names, processes, strict=True)):
                    for documents in draw(process, cfg, count, (s, k), f"{split} {name}"):
                        for ids in documents.numpy():
                            chunks.add(name, ids)
                        if split != "train":
                            cut = documents.reshape(-1, n)
                            log_prob.append(torch.stack([p.log_prob(cut) for p in processes], 1).numpy())
                            rows += [k] * len(cut)
                chunks.write(shop.folder / f"{split}.h5", tokenizer="", source="ergodic", seed=cfg.seed,
                             components=json.dumps(cfg.components))
            if log_prob:
                log_prob, rows = np.concatenate(log_prob), np.array(rows)
                mixture, known = oracle_xe(log_prob, rows)
                with h5py.File(shop.folder / f"{split}.h5", "a") as file:
                    file["oracle_log_prob"] = log_prob.astype(np.float32)
                    file["oracle_xe_mixture"], file["oracle_xe_component"] = mixture, known
            done[split] = dict(chunks.sizes)
        shop.finish(*(f"{split}.h5" for split in done))
    print(f"{len(names)} components over {vocab_size} tokens: " + ", ".join(
        f"{split} {sum(sizes.values()):,} chunks" for split, sizes in done.items()) + f"; written to {cfg.out_dir}")
    return done
