"""Synthetic documents of K hidden Markov components, with the exact optimum for every subset of them."""

import contextlib
import json
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import DataError
from common.telling import bar
from sources.chunks import ChunkSpool
from sources.processes import Process, ProcessError, make_process
from sources.shared import SPLITS, Workshop, counted, room_for

COMPONENTS = [  # the first two differ in how long a state lasts, the third in its tokens, the last in both
    {"name": "sticky", "process": "mess3", "x": 0.05, "a": 0.85, "vocab_map": [0, 1, 2]},
    {"name": "restless", "process": "mess3", "x": 0.2, "a": 0.9, "vocab_map": [0, 1, 2]},
    {"name": "shifted", "process": "mess3", "x": 0.05, "a": 0.85, "vocab_map": [1, 2, 3]},
    {"name": "golden", "process": "no_consecutive_ones", "p": 0.5, "vocab_map": [0, 3]},
]
DRAWN_AT_ONCE = 1_000  # documents

# ---------------------------------------------------------------------------------------------------------- components


def ergodic_components(components: list[dict]) -> tuple[list[str], list[Process]]:
    """Names and processes of the zoo, all over the same vocabulary; raises DataError for what cannot be."""
    names = []
    processes = []
    weights = set()
    for i, component in enumerate(components):
        if not isinstance(component, dict):
            raise DataError(f"components[{i}] = {component!r}: expected {{'process': NAME, ...}}")
        for setting in ("initial_state", "add_bos"):
            if setting in component:
                raise DataError(f"components[{i}]: chunks begin anywhere in a document, so {setting} cannot be set")
        default_name = f"{component.get('process')}-{i}"
        names.append(str(component.get("name", default_name)))
        part = {key: value for key, value in component.items() if key != "name"}
        try:
            # A mixture of one applies its vocab_map.
            process = make_process("nonergodic", components=[part])
        except ProcessError as error:
            raise DataError(str(error)) from error
        processes.append(process)
        weights.add(float(component.get("weight", 1)))
    if len(weights) > 1:
        raise DataError(
            "components of different weight: documents, training and the exact optimum are those of equally frequent "
            "components, so leave weight out"
        )
    if len(set(names)) != len(names) or not names:
        raise DataError(f"components are named {names}: name at least one, and each differently")
    vocab_size = max(process.vocab_size for process in processes)
    return names, [widened(process, vocab_size) for process in processes]


def widened(process: Process, vocab_size: int) -> Process:
    """The same process over a larger vocabulary, whose further tokens it never emits."""
    more = vocab_size - process.vocab_size
    T = F.pad(process.transition_matrices, (0, 0, 0, 0, 0, more))  # [V, S, S]; pairs from the last dimension on
    return Process(
        T,
        process.initial_state,
        process.normalizing_eigenvector,
        process.stationary_state,
        process.name,
    )


def draw(process: Process, documents: int, length: int, seed: int, counter: tuple, text: str) -> Iterator[torch.Tensor]:
    """Documents of a component [up to 1000, length], a pure function of (seed, counter)."""
    sequence = np.random.SeedSequence(seed, spawn_key=counter)
    state = sequence.generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))  # torch takes 63 bits
    for begin in bar(range(0, documents, DRAWN_AT_ONCE), text, unit="thousands"):
        count = min(DRAWN_AT_ONCE, documents - begin)
        yield process.sample(count, length, generator)


# ------------------------------------------------------------------------------------------------------------- oracles


def mixture_log_prob(log_prob: np.ndarray) -> np.ndarray:
    """log p(x_t | x_<t) under the uniform mixture, [N, n], from log p_k(x_t | x_<t) [N, K, n]."""
    of_prefix = np.cumsum(log_prob, -1, dtype=np.float64)  # [N, K, n] log p_k(x_1 .. x_t)
    total = np.logaddexp.reduce(of_prefix, axis=1)  # [N, n] log sum_k p_k(x_1 .. x_t)
    # log p(x_t | x_<t) = log p(x_1 .. x_t) - log p(x_1 .. x_{t-1}); before the first token the sum over k is K.
    K = log_prob.shape[1]
    return np.diff(total, axis=-1, prepend=np.log(K))


def oracle_xe(log_prob: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy by position of the exact predictors: (of the uniform mixture, of the known component), [K, n] each.

    The mixture predicts p(x_t | x_<t) = sum_k w_k p_k(x_t | x_<t) with w_k the posterior of component k given x_<t.

    Args:
        log_prob: log p_k(x_t | x_<t) in nats, [N, K, n]. owner: the true component [N].
    """
    mixture = mixture_log_prob(log_prob)
    known = np.take_along_axis(log_prob, owner[:, None, None], 1)[:, 0]
    return mean_by_owner(-mixture, owner), mean_by_owner(-known, owner)


def mean_by_owner(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """[K, n] from values [N, n] of K owners."""
    return np.stack([values[owner == k].mean(0) for k in range(owner.max() + 1)])


def oracles(log_prob: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
    """What the exact predictors reach on the chunks of a file, by the name that it has there."""
    mixture, known = oracle_xe(log_prob, owner)
    return {
        "oracle_log_prob": log_prob.astype(np.float32),
        "oracle_xe_mixture": mixture,
        "oracle_xe_component": known,
    }


def ergodic(
    *,
    components: list[dict] | None = None,
    train_documents: int = 10_000,
    validation_documents: int = 1_000,
    test_documents: int | None = None,
    chunks_per_document: int = 2,
    chunk_size: int = 100,
    out_dir: str = "data/ergodic",
    seed: int = 1337,
) -> dict:
    """Documents of K components in the layout of prepare_chunks, with the oracles of validation and test.

    Each document is one sequence of its component. Oracles read a chunk from its first token on, as a model does:
    oracle_log_prob [N, K, n] is log p_k(x_t | x_<t), from which the optimum of any subset of components follows;
    oracle_xe_mixture and oracle_xe_component [K, n] are its averages for all components together.
    components: default COMPONENTS.
    test_documents: default as many as of validation; 0 writes no test.h5. The documents of a split are the same
    whatever there is of the others.
    """
    components = COMPONENTS if components is None else components
    names, processes = ergodic_components(components)
    vocab_size = processes[0].vocab_size
    length = chunks_per_document * chunk_size
    if test_documents is None:
        test_documents = validation_documents
    sizes = {}
    with Workshop(out_dir) as shop:
        counts = (train_documents, validation_documents, test_documents)
        room_for(shop.folder / "train.h5", 2 * sum(counts) * len(names) * length)  # bytes of a token
        for s, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
            if not count:
                continue
            log_prob = []  # [N, K, n] of each draw
            owner = []  # the component of each chunk
            with contextlib.closing(ChunkSpool(shop.folder, split, chunk_size, vocab_size)) as chunks:
                for k, (name, process) in enumerate(zip(names, processes, strict=True)):
                    text = f"drawing {count:,} {'training' if split == 'train' else split} documents of {name}"
                    for documents in draw(process, count, length, seed, (s, k), text):
                        for ids in documents.numpy():
                            chunks.add(name, ids)
                        if split == "train":
                            continue
                        cut = documents.reshape(-1, chunk_size)  # each chunk is read without what is before it
                        of_components = [other.log_prob(cut) for other in processes]
                        log_prob.append(torch.stack(of_components, 1).numpy())
                        owner += [k] * len(cut)
                exact = {} if split == "train" else oracles(np.concatenate(log_prob), np.array(owner))
                chunks.write(
                    shop.folder / f"{split}.h5",
                    exact,
                    tokenizer="",
                    source="ergodic",
                    seed=seed,
                    components=json.dumps(components),
                )
            sizes[split] = dict(chunks.sizes)
        # validation.h5 comes last: who waits for it (make_once) finds the others.
        shop.finish(*(f"{split}.h5" for split in ("train", "test", "validation") if split in sizes))
    listed = ", ".join(f"{split} {counted(sum(counts.values()), 'chunk')}" for split, counts in sizes.items())
    print(f"{counted(len(names), 'component')} over {counted(vocab_size, 'token')}: {listed}; written to {out_dir}")
    return sizes
