"""Planted plans: documents whose plan is known, with the exact filter over it.

N documents of D tokens, K plans, S states, V tokens, chunks of C tokens.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.telling import bar
from sources.shared import Workshop, counted, reserve
from sources.streams import stream_dtype, write_meta

BLOCK = 1_000  # documents drawn at once


@dataclass
class Plans:
    """A chain of plans, each a hidden Markov model that starts anew with every chunk; all float64."""

    transition: np.ndarray  # [K, K] between chunks; the first plan is uniform
    stationary: np.ndarray  # [K, S] of the state at the start of a chunk
    switch: np.ndarray  # [K, S, S] between the tokens of a chunk
    emission: np.ndarray  # [K, S, V]
    lengths: list[int]  # emitted tokens of each chunk

    def sample(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [N, D - 1], plan of every chunk [N, chunks])."""
        plan = generator.integers(len(self.transition), size=count)
        tokens, plans = [], []
        for c, length in enumerate(self.lengths):
            if c:
                plan = choose(self.transition[plan], generator)
            plans.append(plan)
            state = choose(self.stationary[plan], generator)
            for i in range(length):
                if i:
                    state = choose(self.switch[plan, state], generator)
                tokens.append(choose(self.emission[plan, state], generator))
        return np.stack(tokens, 1), np.stack(plans, 1)

    def filter(self, tokens: np.ndarray, plans: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(-log p(x_t | x_<t) in nats [N, D - 1], p(plan | tokens so far) at each chunk's end [N, chunks, K]).

        The forward algorithm over (plan, state), normalised at every token; exact. With `plans` [N, chunks] the
        predictor is told the plan of the chunk.
        """
        K = len(self.transition)
        belief = np.full((len(tokens), K), 1 / K)  # over plans [N, K]
        nll, posterior, t = [], [], 0
        for c, length in enumerate(self.lengths):
            if c:
                belief = belief @ self.transition
            if plans is not None:
                belief = np.eye(K)[plans[:, c]]
            joint = belief[:, :, None] * self.stationary  # over plans and states [N, K, S]
            for i in range(length):
                if i:
                    joint = np.einsum("nks,kst->nkt", joint, self.switch)
                likelihood = self.emission[:, :, tokens[:, t]].transpose(2, 0, 1)  # of the token [N, K, S]
                joint = joint * likelihood
                evidence = joint.sum((1, 2))  # p(x_t | x_<t), since joint summed to 1
                joint /= evidence[:, None, None]
                nll.append(-np.log(evidence))
                t += 1
            belief = joint.sum(2)
            posterior.append(belief)
        return np.stack(nll, 1), np.stack(posterior, 1)


def choose(probabilities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One index [N] of each row [N, n]."""
    edges = probabilities.cumsum(1)[:, :-1]
    return (generator.random((len(edges), 1)) >= edges).sum(1)


def chunk_lengths(version: str, chunk_size: int, chunks: int) -> list[int]:
    """Tokens that each chunk emits: C, but C - 1 in the first of v2, which holds bos too."""
    lengths = [chunk_size] * chunks
    if version == "v2_planner_required":
        lengths[0] -= 1
    return lengths


def make_plans(
    *,
    num_plans: int,
    num_states: int,
    vocab_size: int,
    self_transition: float,
    transition_matrix: list[list[float]] | None,
    plan_sharpness: float,
    state_sharpness: float,
    state_persistence: float,
    lengths: list[int],
    seed: int,
) -> Plans:
    """Plan k prefers half of the tokens, neighbours on a ring of tokens sharing some, so that one token says little."""
    K, S, V = num_plans, num_states, vocab_size
    generator = np.random.default_rng([seed, 0])
    if transition_matrix is None:
        transition = np.full((K, K), (1 - self_transition) / max(K - 1, 1))
        np.fill_diagonal(transition, self_transition if K > 1 else 1)
    else:
        transition = np.array(transition_matrix, dtype=np.float64)
    # The tokens stand on a ring in a random order; plan k prefers the half of it that begins at k V / K.
    place = (generator.permutation(V) - V * np.arange(K)[:, None] // K) % V  # [K, V]
    preferred = (place < V / 2)[:, None]  # [K, 1, V]
    logits = plan_sharpness * preferred + state_sharpness * generator.normal(size=(K, S, V))
    emission = np.exp(logits - logits.max(-1, keepdims=True))
    emission /= emission.sum(-1, keepdims=True)
    others = generator.dirichlet([1.0] * S, (K, S))  # where a state goes that does not stay
    switch = state_persistence * np.eye(S) + (1 - state_persistence) * others
    stationary = np.linalg.matrix_power(switch, 1 << 20).mean(1)  # every row of a high power is it
    stationary /= stationary.sum(-1, keepdims=True)
    return Plans(transition, stationary, switch, emission, lengths)


def mutual_information(counts: np.ndarray) -> float:
    """I / sqrt(H H) of a table of counts; 1 if both sides are constant."""
    joint = counts / counts.sum()
    columns, rows, both = entropy(joint.sum(0)), entropy(joint.sum(1)), entropy(joint)
    scale = math.sqrt(columns * rows)
    if not scale:
        return float(columns == rows)
    return float((columns + rows - both) / scale)


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return max(0.0, float(-(p * np.log(p)).sum()))  # a share of all there is may round to more than 1


class Oracle:
    """What the exact filter reaches on documents, block after block."""

    def __init__(self, process: Plans, vocab_size: int):
        K = len(process.transition)
        self.process = process
        self.nll = 0.0  # summed over tokens, in nats
        self.known_plan_nll = 0.0  # of a filter that is told the plan
        self.table = np.zeros((K, K))  # true plan of a chunk by the likeliest at its end
        self.tokens = np.zeros(vocab_size)  # how often each occurs

    def add(self, tokens: np.ndarray, plans: np.ndarray) -> np.ndarray:
        """Count documents in; returns their -log p(x_t | x_<t) [N, D - 1]."""
        nll, posterior = self.process.filter(tokens)
        known, _ = self.process.filter(tokens, plans)
        self.nll += nll.sum()
        self.known_plan_nll += known.sum()
        np.add.at(self.table, (plans, posterior.argmax(-1)), 1)
        self.tokens += np.bincount(tokens.ravel(), minlength=len(self.tokens))
        return nll

    def results(self) -> dict[str, float | None]:
        """Nats a token, and how well the filter finds the plan; None where all chunks have the same."""
        count = self.tokens.sum()
        occur = np.count_nonzero(self.table.sum(1))
        return {
            "oracle_nll": float(self.nll / count),
            "known_plan_nll": float(self.known_plan_nll / count),
            "unigram_entropy": entropy(self.tokens / count),
            "oracle_nmi": mutual_information(self.table) if occur > 1 else None,
        }


def planted(
    *,
    num_plans: int = 4,
    num_states: int = 3,
    vocab_size: int = 32,
    self_transition: float = 0.6,
    transition_matrix: list[list[float]] | None = None,
    plan_sharpness: float = 1.5,
    state_sharpness: float = 2.0,
    state_persistence: float = 0.8,
    version: str = "v2_planner_required",
    chunk_size: int = 16,
    document_chunks: int = 8,
    train_documents: int = 20_000,
    validation_documents: int = 1_000,
    out_dir: str = "data/planted",
    seed: int = 1337,
) -> dict:
    """Documents of planted plans -> train.bin, val.bin, their plans, the oracle, meta.json, which is returned."""
    process = make_plans(
        num_plans=num_plans,
        num_states=num_states,
        vocab_size=vocab_size,
        self_transition=self_transition,
        transition_matrix=transition_matrix,
        plan_sharpness=plan_sharpness,
        state_sharpness=state_sharpness,
        state_persistence=state_persistence,
        lengths=chunk_lengths(version, chunk_size, document_chunks),
        seed=seed,
    )
    bos, length = vocab_size, 1 + sum(process.lengths)
    counts = {"train": train_documents, "val": validation_documents}
    sizes = {}
    oracle = Oracle(process, vocab_size)
    with Workshop(out_dir) as shop:
        nll = new_array(shop.folder / "val_oracle_nll.npy", np.float32, validation_documents, length - 1)
        for s, (split, count) in enumerate(counts.items(), 1):
            generator = np.random.default_rng([seed, s])  # of the split: 0 made the plans
            plans = new_array(shop.folder / f"{split}_plans.npy", np.int64, count, document_chunks)
            with open(shop.folder / f"{split}.bin", "wb") as file:
                what = f"drawing {count:,} {'training' if split == 'train' else 'validation'} documents"
                for begin in bar(range(0, count, BLOCK), what, unit="thousands"):
                    rows = slice(begin, min(begin + BLOCK, count))
                    tokens, plans[rows] = process.sample(rows.stop - begin, generator)
                    documents = np.pad(tokens, ((0, 0), (1, 0)), constant_values=bos)
                    file.write(documents.astype(stream_dtype(bos + 1)))
                    if split == "val":
                        nll[rows] = oracle.add(tokens, plans[rows])
            sizes[split] = {"tokens": count * length, "documents": count}
            plans.flush()
        nll.flush()
        results = oracle.results()
        files = ["train.bin", "val.bin", "train_plans.npy", "val_plans.npy", "val_oracle_nll.npy"]
        meta = write_meta(
            shop.folder,
            "planted",
            bos + 1,
            {"bos": bos},
            sizes,
            files,
            tokenizer="",
            tokenizer_hash="",
            source="planted",
            seed=seed,
            document_length=length,
            chunk_size=chunk_size,
            version=version,
            num_plans=num_plans,
            **results,
            transition_matrix=process.transition.tolist(),
        )
        shop.finish(*files, "meta.json")
    documents = counted(train_documents, "document")
    print(f"{documents} for training, {validation_documents:,} for validation, of {length} tokens; written to "
          f"{out_dir}")
    print(f"nats a token: {results['unigram_entropy']:.4f} by how often tokens occur, {results['oracle_nll']:.4f} by "
          f"the exact filter, {results['known_plan_nll']:.4f} if the plan is told")
    if results["oracle_nmi"] is not None:
        print(f"the exact filter finds the plan: normalised mutual information {results['oracle_nmi']:.4f} of 1")
    return meta


def new_array(path: Path, dtype: type, *shape: int) -> np.ndarray:
    """A .npy file of this shape, as a memory map to fill."""
    dtype = np.dtype(dtype)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        file.flush()
        reserve(file, file.tell() + dtype.itemsize * math.prod(shape))
    return np.lib.format.open_memmap(path, "r+")
