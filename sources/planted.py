"""Planted plans: documents whose plan is known, with the exact filter over it.

N documents of D tokens, K plans, S states, V tokens, chunks of C tokens.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from sources.shared import Workshop, progress
from sources.text import stream_dtype, write_meta


@dataclass
class Plans:
    """A chain of plans, each a hidden Markov model that starts anew with every chunk; all float64."""

    transition: np.ndarray  # [K, K] between chunks; the first plan is uniform
    stationary: np.ndarray  # [K, S] of the state at the start of a chunk
    switch: np.ndarray  # [K, S, S] between the tokens of a chunk
    emission: np.ndarray  # [K, S, V]
    lengths: list[int]  # emitted tokens of each chunk: C, but C - 1 in the first of v2, whose bos is consumed too

    def sample(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [N, D - 1], plan of every chunk [N, chunks])."""
        plan, tokens, plans = generator.integers(len(self.transition), size=count), [], []
        for c, length in enumerate(self.lengths):
            plan = drawn(self.transition[plan], generator) if c else plan
            state = drawn(self.stationary[plan], generator)
            plans.append(plan)
            for i in range(length):
                state = drawn(self.switch[plan, state], generator) if i else state
                tokens.append(drawn(self.emission[plan, state], generator))
        return np.stack(tokens, 1), np.stack(plans, 1)

    def filter(self, tokens: np.ndarray, plans: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(-log p(x_t | x_<t) in nats [N, D - 1], p(plan | tokens so far) at each chunk's end [N, chunks, K]).

        The forward algorithm over (plan, state), normalised at every token; exact. With `plans` [N, chunks] the
        predictor is told the plan of the chunk.
        """
        K = len(self.transition)
        belief, nll, posterior = np.full((len(tokens), K), 1 / K), [], []  # belief [N, K]
        column = iter(tokens.T)
        for c, length in enumerate(self.lengths):
            belief = belief @ self.transition if c else belief
            belief = belief if plans is None else np.eye(K)[plans[:, c]]
            joint = belief[:, :, None] * self.stationary  # [N, K, S]
            for i in range(length):
                joint = np.einsum("nks,kst->nkt", joint, self.switch) if i else joint
                joint = joint * self.emission[:, :, next(column)].transpose(2, 0, 1)
                evidence = joint.sum((1, 2))
                joint /= evidence[:, None, None]
                nll.append(-np.log(evidence))
            belief = joint.sum(2)
            posterior.append(belief)
        return np.stack(nll, 1), np.stack(posterior, 1)


def drawn(probabilities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One index [N] of each row [N, n]."""
    edges = probabilities.cumsum(1)[:, :-1]
    return (generator.random((len(edges), 1)) >= edges).sum(1)


def make_plans(cfg) -> Plans:
    """Plan k prefers half of the tokens, neighbours on a ring of tokens sharing some, so that one token says little."""
    K, S, V, C = cfg.num_plans, cfg.num_states, cfg.vocab_size, cfg.chunk_size
    generator = np.random.default_rng([cfg.seed, 0])
    transition = np.full((K, K), (1 - cfg.self_transition) / max(K - 1, 1))
    np.fill_diagonal(transition, cfg.self_transition if K > 1 else 1)
    if cfg.transition_matrix is not None:
        transition = np.array(cfg.transition_matrix, dtype=np.float64)
    place = (generator.permutation(V) - V * np.arange(K)[:, None] // K) % V  # [K, V]
    logits = cfg.plan_sharpness * (place < V / 2)[:, None] + cfg.state_sharpness * generator.normal(size=(K, S, V))
    emission = np.exp(logits - logits.max(-1, keepdims=True))
    switch = cfg.state_persistence * np.eye(S) + (1 - cfg.state_persistence) * generator.dirichlet([1.0] * S, (K, S))
    stationary = np.linalg.matrix_power(switch, 1 << 20).mean(1)
    stationary /= stationary.sum(-1, keepdims=True)
    lengths = [C - (cfg.version == "v2_planner_required"), *[C] * (cfg.document_chunks - 1)]
    return Plans(transition, stationary, switch, emission / emission.sum(-1, keepdims=True), lengths)


def mutual_information(counts: np.ndarray) -> float:
    """I / sqrt(H H) of a table of counts; 1 if both sides are constant."""
    joint = counts / counts.sum()
    entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (joint.sum(0), joint.sum(1), joint)]
    information, scale = entropy[0] + entropy[1] - entropy[2], math.sqrt(entropy[0] * entropy[1])
    return float(information / scale) if scale else float(entropy[0] == entropy[1])


def planted(*, num_plans: int = 4, num_states: int = 3, vocab_size: int = 32, self_transition: float = 0.6,
            transition_matrix: list[list[float]] | None = None, plan_sharpness: float = 1.5, state_sharpness: float =
            2.0, state_persistence: float = 0.8, version: str =
            "v2_planner_required", chunk_size: int = 16, document_chunks: int = 8, train_documents: int = 20_000,
            validation_documents: int = 1_000, out_dir: str = "data/planted", seed: int = 1337) -> dict:
    """Documents of planted plans -> train.bin, val.bin, their plans, the oracle, meta.json, which is returned."""
    cfg = SimpleNamespace(**locals())
    process, made, K = make_plans(cfg), {}, cfg.num_plans
    chunks, length, dtype = cfg.document_chunks, 1 + sum(process.lengths), stream_dtype(cfg.vocab_size + 1)
    sums, table, unigram = np.zeros(2), np.zeros((K, K)), np.zeros(cfg.vocab_size)
    files = ["train.bin", "val.bin", "train_plans.npy", "val_plans.npy", "val_oracle_nll.npy", "meta.json"]
    with Workshop(cfg.out_dir) as shop:
        def array(name, kind, *shape):
            return np.lib.format.open_memmap(shop.folder / name, "w+", kind, shape)

        for s, (split, count) in enumerate((("train", cfg.train_documents), ("val", cfg.validation_documents)), 1):
            generator = np.random.default_rng([cfg.seed, s])
            plans = array(f"{split}_plans.npy", np.int64, count, chunks)
            oracle = array("val_oracle_nll.npy", np.float32, count, length - 1) if split == "val" else None
            with open(shop.folder / f"{split}.bin", "wb") as file:
                for begin in progress(range(0, count, 1_000), f"{split} documents", "kdoc"):
                    rows = slice(begin, min(begin + 1_000, count))
                    tokens, plans[rows] = process.sample(rows.stop - begin, generator)
                    np.pad(tokens, ((0, 0), (1, 0)), constant_values=cfg.vocab_size).astype(dtype).tofile(file)
                    if oracle is None:
                        continue
                    (nll, posterior), (known, _) = process.filter(tokens), process.filter(tokens, plans[rows])
                    oracle[rows], sums = nll, sums + (nll.sum(), known.sum())
                    np.add.at(table, (plans[rows], posterior.argmax(-1)), 1)
                    unigram += np.bincount(tokens.ravel(), minlength=cfg.vocab_size)
            made[split] = {"tokens": count * length, "documents": count}
        oracle_nll, known_plan_nll = (sums / (cfg.validation_documents * (length - 1))).tolist()
        share = unigram[unigram > 0] / unigram.sum()
        meta = write_meta(
            shop.folder, "planted", cfg.vocab_size + 1, {"bos": cfg.vocab_size}, made, tokenizer="", tokenizer_hash="",
            source="planted", seed=cfg.seed, document_length=length, chunk_size=cfg.chunk_size, version=cfg.version,
            num_plans=K, oracle_nll=oracle_nll, known_plan_nll=known_plan_nll,
            unigram_entropy=float(-(share * np.log(share)).sum()), oracle_nmi=mutual_information(table),
            transition_matrix=process.transition.tolist())
        shop.finish(*files)
    print(f"planted: {cfg.train_documents:,} and {cfg.validation_documents:,} documents of {length} tokens; nats a "
          f"token: unigram {meta['unigram_entropy']:.4f}, oracle {oracle_nll:.4f}, known plan {known_plan_nll:.4f}; "
          f"the oracle finds the plan with NMI {meta['oracle_nmi']:.4f}; written to {cfg.out_dir}")
    return meta
