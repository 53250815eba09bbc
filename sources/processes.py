"""Generalized hidden Markov processes: the zoo, sampling, exact beliefs, likelihoods and entropies, mixtures, framing.

Dimensions: B batch, L tokens, V tokens of the vocabulary, S states.
"""

import difflib
import inspect
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.errors import InputError


class ProcessError(InputError):
    """A process that was asked for cannot exist; the message says why and what is allowed."""


def _probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ProcessError(f"{name} = {value:g} is no probability: use a value in [0, 1]")


def coin(p: float = 0.5) -> np.ndarray:
    """A biased coin: emits 0 with probability p. One state."""
    _probabilities(p=p)
    return np.array([[[p]], [[1 - p]]])


def even_ones(p: float = 0.5) -> np.ndarray:
    """The even process: runs of ones have even length. Two states."""
    _probabilities(p=p)
    return np.array([[[1 - p, 0], [0, 0]], [[0, p], [1, 0]]])


def no_consecutive_ones(p: float = 0.5) -> np.ndarray:
    """The golden-mean process: a one is followed by a zero. Two states."""
    _probabilities(p=p)
    return np.array([[[1 - p, 0], [1, 0]], [[0, p], [0, 0]]])


def zero_one_random(p: float = 0.5) -> np.ndarray:
    """0, 1, then a random bit (1 with probability p), over and over; the phase is hidden. Three states."""
    _probabilities(p=p)
    return np.array([[[0, 1, 0], [0, 0, 0], [1 - p, 0, 0]], [[0, 0, 0], [0, 0, 1], [p, 0, 0]]])


def sns(p: float = 0.5, q: float = 0.5) -> np.ndarray:
    """The simple nonunifilar source: two states, infinitely many beliefs (Crutchfield 1994)."""
    _probabilities(p=p, q=q)
    return np.array([[[1 - p, p], [0, 1 - q]], [[0, 0], [q, 0]]])


def mess3(x: float = 0.05, a: float = 0.85) -> np.ndarray:
    """Mess3 (Marzen and Crutchfield 2017): three states, and beliefs that form a fractal in the simplex."""
    _probabilities(a=a)
    if not 0 <= x <= 0.5:
        raise ProcessError(f"x = {x:g} leaves a negative probability of staying, 1 - 2x: use a value in [0, 0.5]")
    move = np.where(np.eye(3), 1 - 2 * x, x)  # [from, to]
    emit = np.where(np.eye(3), a, (1 - a) / 2)  # [token, to]
    return emit[:, None, :] * move


def rrxor(p1: float = 0.5, p2: float = 0.5) -> np.ndarray:
    """Two random bits, then their exclusive or. States S, 0, 1, T, F."""
    _probabilities(p1=p1, p2=p2)
    T = np.zeros((2, 5, 5))
    T[0, 0, 1], T[1, 0, 2] = p1, 1 - p1
    T[0, 1, 4], T[1, 1, 3] = p2, 1 - p2
    T[0, 2, 3], T[1, 2, 4] = p2, 1 - p2
    T[1, 3, 0] = T[0, 4, 0] = 1
    return T


def leaky_rrxor(p1: float = 0.5, p2: float = 0.5, epsilon: float = 0.1) -> np.ndarray:
    """rrxor that jumps, with probability epsilon, to any state under any token."""
    _probabilities(epsilon=epsilon)
    return (1 - epsilon) * rrxor(p1, p2) + epsilon / 10


def matching_parens(open_probs: list = (1.0, 0.5, 0.4)) -> np.ndarray:
    """Nested parentheses: 0 opens with probability open_probs[depth], 1 closes. States are depths."""
    open_probs = [float(p) for p in open_probs]
    if open_probs and open_probs[-1] != 0:
        open_probs = [*open_probs, 0.0]
    if len(open_probs) < 2 or open_probs[0] != 1:
        raise ProcessError(f"open_probs = {open_probs}: at depth 0 one can only open, so it must start with 1")
    _probabilities(**{f"open_probs[{i}]": p for i, p in enumerate(open_probs)})
    p = np.array(open_probs)
    return np.stack([np.diag(p[:-1], 1), np.diag(1 - p[1:], -1)])


def mr_name(p: float = 0.4, q: float = 0.25) -> np.ndarray:
    """Tokens Mr., Something, Blah, name; the state is the last token."""
    _probabilities(p=p, q=q, **{"1 - p - q": 1 - p - q})
    s = 1 - p - q
    chain = np.array([[0, 0, 0, 1], [q, s, p, 0], [q, p, s, 0], [0, 0.5, 0.5, 0]])  # [from, to]
    return np.eye(4)[:, None, :] * chain


def days_of_week() -> np.ndarray:
    """Tokens M Tu W Th F Sa Su Tmrw Yest Wknd Wkdy; the state is the day the last token spoke of."""
    T = np.zeros((11, 7, 7))
    for day in range(7):
        for named in range(7):
            T[named, day, named] = 5 if named == (day + 1) % 7 else 1
        T[7, day, (day + 1) % 7] = T[8, day, (day - 1) % 7] = 1
        T[9, day, 5:], T[10, day, :5] = 1 / 2, 1 / 5
    return T / T.sum((0, 2))[:, None]


def tom_quantum(alpha: float = 1.0, beta: float = 7.14) -> np.ndarray:
    """Tom's quantum process: a qubit seen through four outcomes; no finite hidden Markov model generates it."""
    if not alpha**2 + beta**2 > 0:
        raise ProcessError("alpha and beta are both 0: one of them must not be")
    g = 1 / (4 * (alpha**2 + beta**2))
    d, m, o = 1 / 4, (alpha**2 - beta**2) * g, 2 * alpha * beta * g
    return np.array([
        [[d, 0, o], [0, m, 0], [o, 0, d]], [[d, 0, -o], [0, m, 0], [-o, 0, d]],
        [[d, o, 0], [o, d, 0], [0, 0, m]], [[d, -o, 0], [-o, d, 0], [0, 0, m]],
    ])  # fmt: skip


def fanizza(alpha: float = 2000.0, lamb: float = 0.49) -> np.ndarray:
    """The process of Fanizza et al. (2024) that four real dimensions generate and no finite hidden Markov model."""
    if not 0 < lamb < 1:
        raise ProcessError(f"lamb = {lamb:g}: use a value in (0, 1); up to 0.5 all words have non-negative weight")
    c, s = math.cos(alpha), math.sin(alpha)
    det = 1 - 2 * lamb * c + lamb**2
    A, B = (1 - lamb * c + lamb * s) / det, (1 - lamb * c - lamb * s) / det
    pi0 = np.array([1 - (2 / (1 - lamb) - A - B) / 4, 1 / (2 * (1 - lamb)), -A / 4, -B / 4])
    w = np.array([1, 1 - lamb, 1 + lamb * (s - c), 1 - lamb * (s + c)])
    T1 = np.zeros((4, 4))
    T1[1, 1], T1[2:, 2:] = 1, [[c, -s], [s, c]]
    return np.stack([np.outer(w, pi0), lamb * T1])


def post_quantum(log_alpha: float = 1.0, beta: float = 0.5) -> np.ndarray:
    """A process beyond quantum theory: three real dimensions, no finite-dimensional quantum model (Fanizza 2024)."""
    if not (log_alpha > 0 and 0 < beta < 1):
        raise ProcessError(f"log_alpha = {log_alpha:g}, beta = {beta:g}: needs log_alpha > 0 and 0 < beta < 1")
    alpha, ratio = math.exp(log_alpha), log_alpha / math.log(beta)
    if abs(alpha + beta - 2) < 1e-12 or abs(ratio - round(ratio)) < 1e-12:
        raise ProcessError(f"log_alpha = {log_alpha:g}, beta = {beta:g}: needs exp(log_alpha) + beta != 2 and "
                           "log_alpha / log(beta) no integer")
    M = [np.array([[v, 0, 0], [0, 1, 0], [0, math.log(v), 1]]) for v in (alpha, beta)]
    return np.stack([np.outer([1, 1, 0], [1, -1, -1]), *M])


PROCESSES = {f.__name__: f for f in (
    coin, even_ones, no_consecutive_ones, zero_one_random, sns, mess3, rrxor, leaky_rrxor, matching_parens, mr_name,
    days_of_week, tom_quantum, fanizza, post_quantum,
)}  # fmt: skip


class Estimate(float):
    """A number with `error`: 0 where it is exact, else a standard error or (for brackets) a half width, in nats."""

    error: float

    def __new__(cls, value: float, error: float = 0.0):
        self = super().__new__(cls, value)
        self.error = float(error)
        return self


class MixedState(NamedTuple):
    """A node of the mixed-state tree: a word, its probability and the belief [S] after it."""

    word: tuple
    probability: float
    belief: torch.Tensor


IMPOSSIBLE = 1e-13  # a conditional probability below this is rounding of an exact 0


class Process:
    """A stack T[x][i, j] = weight of "emit token x and go to j, from i", in row-vector convention.

    The stack is scaled so that M = sum_x T[x] has principal eigenvalue 1, with right eigenvector r (summing to S)
    and left eigenvector pi (summing to 1). The belief after a word w is v T[w1] ... T[wL], scaled to belief . r = 1;
    the probability of the next token x is then belief T[x] r (Upper 1997; Jaeger 2000). With T >= 0 and r = 1 this is
    a hidden Markov model, and a belief is the posterior over its S states.

    Args:
        matrices: [V, S, S], weights.
        initial_state: [S], where sequences start; default the stationary state.
        eigenvector, stationary: r and pi where the caller knows them (a mixture has no unique ones).
    Raises:
        ProcessError: if the stack is no process: wrong shape, not finite, no positive principal eigenvalue, several
            stationary states and no initial_state, or a word of negative weight.
    """

    def __init__(self, matrices, initial_state=None, eigenvector=None, stationary=None, name: str = "custom"):
        T = np.asarray(matrices, dtype=np.float64)
        if T.ndim != 3 or T.shape[1] != T.shape[2] or 0 in T.shape:
            raise ProcessError(f"{name}: matrices have shape {list(T.shape)}; expected [V, S, S]")
        if not np.isfinite(T).all():
            raise ProcessError(f"{name}: matrices hold NaN or infinite weights")
        self.name, self.vocab_size, self.num_states = name, T.shape[0], T.shape[1]
        start = None if initial_state is None else np.asarray(initial_state, dtype=np.float64)
        if start is not None and (start.shape != (self.num_states,) or not np.isfinite(start).all()):
            raise ProcessError(f"{name}: initial_state must be {self.num_states} numbers, finite and one a state")
        T, r, pi = _normalize(T, name, start) if eigenvector is None else (T, eigenvector, stationary)
        r, pi = np.asarray(r, dtype=np.float64), np.asarray(pi, dtype=np.float64)
        start = pi if start is None else start
        if not start @ r > 0:
            raise ProcessError(f"{name}: initial_state must have positive weight")
        self.is_hmm = bool((T >= 0).all() and np.allclose(r, 1, atol=1e-9))
        if self.is_hmm and (start < 0).any():
            raise ProcessError(f"{name}: initial_state holds a negative probability")
        self.transition_matrices, self.normalizing_eigenvector = torch.from_numpy(T.copy()), torch.from_numpy(r.copy())
        self.stationary_state, self.initial_state = torch.from_numpy(pi.copy()), torch.from_numpy(start / (start @ r))
        self._tables()
        if not self.is_hmm:
            self._check_words()

    def _tables(self) -> None:
        """What sampling and filtering look up, derived from the stack (see `generate` and `_filter`)."""
        T, r, S = self.transition_matrices, self.normalizing_eigenvector, self.num_states
        emit = T @ r  # [V, S] weight of a token from a state
        self._step = torch.cat([emit.cumsum(0), T.transpose(1, 2).reshape(-1, S)])  # [V + V*S, S] acting on columns
        if self.is_hmm:
            joint = T.permute(1, 0, 2).reshape(S, -1)  # [S, V*S] probability of (token, next state)
            state, outcome = joint.nonzero(as_tuple=True)
            edges = (joint / joint.sum(1, keepdim=True)).cumsum(1)[state, outcome]
            last = torch.cat([state[1:] != state[:-1], torch.ones(1, dtype=torch.bool, device=state.device)])
            # State s owns [2s, 2s + 1.5): the slack keeps u + 2s, rounded up, out of the next state's interval.
            self._edges = torch.where(last, 1.5, edges) + 2 * state
            self._edge_token, self._edge_next = outcome // S, outcome % S
            self._edge_offset = 2.0 * self._edge_next
            self._start_edges = (self.initial_state.cumsum(0) / self.initial_state.sum())[:-1].contiguous()

    def to(self, device) -> "Process":
        """Move to a device, in place."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self

    @property
    def device(self) -> torch.device:
        return self.transition_matrices.device

    # Sampling --------------------------------------------------------------------------------------------------

    def sample(self, batch: int, length: int, generator: torch.Generator | None = None, return_states: bool = False):
        """Draw tokens [batch, length] (int64); with return_states also the hidden path [batch, length + 1].

        Raises ProcessError if states are asked of a process that is no hidden Markov model.
        """
        if return_states and not self.is_hmm:
            raise ProcessError(f"{self.name} has no hidden path: its weights are no probabilities of states")
        uniforms = torch.rand(length + 1, batch, generator=generator, dtype=torch.float64, device=self.device)
        return self.generate(uniforms, whole_path=True) if return_states else self.generate(uniforms)[0]

    def generate(self, uniforms: torch.Tensor, start: torch.Tensor | None = None, whole_path: bool = False):
        """Turn uniforms [L + 1, B] into tokens [B, L], by inverting the distribution function at every step.

        Row 0 draws the starting state, unless `start` continues an earlier call. Returns the tokens and what to
        continue from: a hidden Markov model's last states [B] (or whole path, [B, L + 1]), else the beliefs [B, S].
        """
        length, batch = uniforms.shape[0] - 1, uniforms.shape[1]
        if not self.is_hmm:
            return self._generate_by_belief(uniforms[1:], start)
        if start is None:
            start = torch.searchsorted(self._start_edges, uniforms[0], right=True)
        chosen = torch.empty(length, batch, dtype=torch.int64, device=self.device)
        offset = 2.0 * start
        for t in range(length):  # one search among all (state, outcome) intervals: the hot loop, three kernels a token
            torch.searchsorted(self._edges, uniforms[t + 1] + offset, right=True, out=chosen[t])
            offset = self._edge_offset[chosen[t]]
        path = torch.cat([start[None], self._edge_next[chosen]]).t() if whole_path else (0.5 * offset).long()
        return self._edge_token[chosen].t().contiguous(), path

    def _generate_by_belief(self, uniforms: torch.Tensor, start: torch.Tensor | None):
        """Sampling where only the belief is known: GHMM states are no random variables."""
        (length, batch), V, S = uniforms.shape, self.vocab_size, self.num_states
        belief = (self.initial_state[:, None].expand(S, batch) if start is None else start.t()).contiguous()  # [S, B]
        tokens = torch.empty(length, batch, dtype=torch.int64, device=self.device)
        for t in range(length):
            step = self._step @ belief  # [V + V*S, B]: running sums over tokens, then all successors
            token = (uniforms[t] * step[V - 1] >= step[: V - 1]).sum(0)
            belief = step[V:].view(V, S, batch).gather(0, token.expand(1, S, batch))[0] / step[V - 1]
            tokens[t] = token
        belief = belief / (self.normalizing_eigenvector @ belief)  # each division lagged a step; the last is still due
        return tokens.t().contiguous(), belief.t()

    # Filtering -------------------------------------------------------------------------------------------------

    def _filter(self, tokens: torch.Tensor, start: torch.Tensor | None = None):
        """Beliefs [L + 1, S, B] and p(token | before) [L, B] of tokens [B, L], time first for contiguous rows.

        After an impossible token both are meaningless. Beliefs are rescaled every 16 tokens only: float64 holds the
        product of 16 conditional probabilities.
        """
        tokens = self._checked(tokens)
        (batch, length), V, S = tokens.shape, self.vocab_size, self.num_states
        columns, successors = tokens.t().contiguous(), self._step[V:]
        beliefs = torch.empty(length + 1, S, batch, dtype=torch.float64, device=self.device)
        beliefs[0] = self.initial_state[:, None] if start is None else start.t()
        probs = torch.empty(length, batch, dtype=torch.float64, device=self.device)
        for begin in range(0, length, 16):
            block = slice(begin, min(begin + 16, length))
            for t in range(block.start, block.stop):
                following = (successors @ beliefs[t]).view(V, S, batch)
                torch.gather(following, 0, columns[t].expand(1, S, batch), out=beliefs[t + 1][None])
            weights = self.normalizing_eigenvector @ beliefs[begin : block.stop + 1]  # [t, B]
            torch.div(weights[1:], weights[:-1], out=probs[block])
            beliefs[begin + 1 : block.stop + 1] /= weights[1:, None]
        return beliefs, probs

    def _checked(self, tokens) -> torch.Tensor:
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        if tokens.ndim != 2:
            raise ProcessError(f"tokens have shape {list(tokens.shape)}; expected [B, L]")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ProcessError(f"tokens of {self.name} are 0..{self.vocab_size - 1}; "
                               f"got {int(tokens.min())}..{int(tokens.max())}")
        return tokens

    def beliefs(self, tokens) -> torch.Tensor:
        """Predictive state before each token and after the last, [B, L + 1, S], for tokens [B, L].

        Raises ProcessError for a word of probability 0, naming the first token that cannot be.
        """
        beliefs, probs = self._filter(tokens)
        if not (probs > IMPOSSIBLE).all():
            t, b = (~(probs > IMPOSSIBLE)).nonzero()[0].tolist()
            word = self._checked(tokens)[b, : t + 1].tolist()
            raise ProcessError(f"token {word[-1]} at position {t} of sequence {b} is impossible under {self.name} "
                               f"after {word[max(0, t - 8):-1]}: no belief follows it")
        return beliefs.permute(2, 0, 1)

    def log_prob(self, tokens) -> torch.Tensor:
        """log p(token | tokens before it) in nats, [B, L]; -inf from the first impossible token on."""
        possible = (probs := self._filter(tokens)[1]) > IMPOSSIBLE
        if not possible.all():  # nothing follows an impossible word, whatever 0/0 gave
            probs = torch.where(possible.long().cumprod(0).bool(), probs, 0)
        return probs.log().t()

    def word_probability(self, word) -> float:
        """Probability that a sequence from the initial state begins with the word."""
        word = [int(x) for x in word]
        return math.exp(self.log_prob([word]).sum()) if word else 1.0

    def next_token_probs(self, belief) -> torch.Tensor:
        """p(next token | belief), [..., V] for beliefs [..., S]."""
        belief = torch.as_tensor(belief, dtype=torch.float64, device=self.device)
        return (belief @ (self.transition_matrices @ self.normalizing_eigenvector).t()).clamp_min(0)

    # Entropies -------------------------------------------------------------------------------------------------

    def children(self, belief: torch.Tensor, weight: torch.Tensor):
        """All possible one-token continuations of beliefs [N, S]: (parent, token, belief, weight), parent-major."""
        joint = torch.einsum("ns,vsj->nvj", belief, self.transition_matrices)
        prob = joint @ self.normalizing_eigenvector  # [N, V]
        parent, token = (prob > IMPOSSIBLE).nonzero(as_tuple=True)
        prob = prob[parent, token]
        return parent, token, joint[parent, token] / prob[:, None], weight[parent] * prob

    def all_words(self, length: int, max_words: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(words [N, length] in lexicographic order, probabilities [N]) of all that can be; None beyond max_words."""
        words, belief = torch.empty(1, 0, dtype=torch.int64, device=self.device), self.initial_state[None]
        weight = torch.ones_like(belief[:, 0])
        for _ in range(length):
            parent, token, belief, weight = self.children(belief, weight)
            if len(token) > max_words:
                return None
            words = torch.cat([words[parent], token[:, None]], 1)
        return words, weight

    def _levels(self, depth: int, max_nodes: int, belief: torch.Tensor | None = None, weight=None):
        """Yield (beliefs [N, S], weights [N]) of all words of length 0, 1, ..., depth, equal beliefs merged.

        Starts from the initial state unless told otherwise; stops early where a level could exceed max_nodes.
        """
        belief = self.initial_state[None] if belief is None else belief
        weight = torch.ones_like(belief[:, 0]) if weight is None else weight
        for length in range(depth + 1):
            yield belief, weight
            if length == depth or len(belief) * self.vocab_size > max_nodes:
                return
            belief, weight = _merge(*self.children(belief, weight)[2:])

    def _entropy(self, belief: torch.Tensor) -> torch.Tensor:
        """Entropy in nats of the next token, [...] for beliefs [..., S]."""
        return torch.special.entr(self.next_token_probs(belief)).sum(-1)

    def entropies(self, length: int, max_nodes: int = 300_000, samples: int = 20_000, seed: int = 0) -> list[Estimate]:
        """H(next token | the first l tokens) for l = 0..length: exact while enumeration fits in max_nodes.

        Beyond that, the mean over sampled words of the entropy of the exact prediction, with its standard error.
        """
        found = [Estimate(float(w @ self._entropy(b))) for b, w in self._levels(length, max_nodes)]
        if len(found) <= length:
            generator = torch.Generator(self.device).manual_seed(seed)
            beliefs, _ = self._filter(self.sample(samples, length, generator))
            entropy = self._entropy(beliefs[len(found) :].transpose(1, 2))  # [l, samples]
            found += map(Estimate, entropy.mean(1).tolist(), (entropy.std(1) / samples**0.5).tolist())
        return found

    def myopic_entropy(self, length: int, max_nodes: int = 300_000) -> Estimate:
        """H(next token | first `length` tokens) in nats; `.error` is 0 if exact, else a standard error."""
        return self.entropies(length, max_nodes)[-1]

    def optimal_loss(self, length: int, max_nodes: int = 300_000) -> torch.Tensor:
        """[length]: the least loss a model can have at each position, having read 1, 2, ..., length tokens."""
        return torch.tensor(self.entropies(length, max_nodes)[1:], dtype=torch.float64)

    def entropy_rate(self, max_nodes: int = 100_000, samples: int = 2_000, length: int = 1_000) -> Estimate:
        """Entropy per token in the limit, in nats, with an error.

        Finitely many beliefs: the average over the chain of beliefs, exact. A hidden Markov model otherwise: halfway
        between H(next | L tokens), which bounds it from above, and H(next | first state, L tokens), from below (Cover
        and Thomas, theorem 4.5.1), with half the gap as error. Failing both, Monte Carlo and its standard error.
        """
        chain = self._belief_chain()
        if chain is not None:
            beliefs, transitions = chain
            return Estimate(_limit(transitions)[0] @ self._entropy(beliefs))
        if self.is_hmm:
            pi = self.initial_state @ _limit(self.transition_matrices.sum(0))  # a mixture keeps its start's weights
            bounds = zip(self._levels(200, max_nodes, pi[None]),
                         self._levels(200, max_nodes, torch.eye(self.num_states).to(pi), pi), strict=False)
            for level in bounds:
                upper, lower = (float(w @ self._entropy(b)) for b, w in level)
                if upper - lower < 1e-12:
                    break
            if upper - lower < 1e-3:
                return Estimate((upper + lower) / 2, max(0.0, upper - lower) / 2)
        tokens = self.sample(samples, length, torch.Generator(self.device).manual_seed(0))
        entropy = self._entropy(self._filter(tokens)[0][length // 2 :].transpose(1, 2)).mean(0)  # [samples]
        return Estimate(entropy.mean(), entropy.std() / samples**0.5)

    def _belief_chain(self, max_beliefs: int = 1_000):
        """The Markov chain of beliefs, (beliefs [N, S], transitions [N, N]), from the initial one; None if large."""
        beliefs, edges, new = self.initial_state[None], [], slice(0, 1)
        while new.start < new.stop:
            parent, _, child, prob = self.children(beliefs[new], torch.ones_like(beliefs[new, 0]))
            keys, ids = torch.unique(_keys(torch.cat([beliefs, child])), return_inverse=True)
            size = len(beliefs)
            number = torch.full_like(keys, -1)
            number[ids[:size]] = torch.arange(size, device=self.device)
            unseen, where = torch.unique(ids[size:][number[ids[size:]] < 0], return_inverse=True)
            number[unseen] = torch.arange(size, size + len(unseen), device=self.device)
            edges.append((parent + new.start, number[ids[size:]], prob))
            fresh = torch.empty(len(unseen), self.num_states).to(beliefs)
            fresh[where] = child[edges[-1][1] >= size]
            beliefs, new = torch.cat([beliefs, fresh]), slice(size, size + len(fresh))
            if len(beliefs) > max_beliefs:
                return None
        source, target, prob = (torch.cat(column) for column in zip(*edges, strict=True))
        transitions = torch.zeros(len(beliefs), len(beliefs)).to(beliefs)
        return beliefs, transitions.index_put_((source, target), prob, accumulate=True)

    def mixed_state_tree(self, depth: int, min_prob: float = 0.0, order: str = "breadth") -> list[MixedState]:
        """Every word of up to `depth` tokens whose probability is at least min_prob (and not 0), with its belief.

        order: "breadth" lists short words first, "depth" lists each word directly before its continuations.
        """
        if order not in ("breadth", "depth"):
            raise ProcessError(f"order = {order!r}: use 'breadth' or 'depth'")
        words, belief = [()], self.initial_state[None]
        weight, nodes = torch.ones_like(belief[:, 0]), []
        for length in range(depth + 1):
            nodes += map(MixedState, words, weight.tolist(), belief)
            if length < depth:
                parent, token, belief, weight = self.children(belief, weight)
                keep = weight >= min_prob
                belief, weight = belief[keep], weight[keep]
                words = [(*words[p], x) for p, x in zip(parent[keep].tolist(), token[keep].tolist(), strict=True)]
        return nodes if order == "breadth" else sorted(nodes, key=lambda node: node.word)

    def _check_words(self, depth: int = 24, beam: int = 4_000) -> None:
        """Look for a word of negative weight: all short words, then the beam of those nearest to having one."""
        emit = (self.transition_matrices @ self.normalizing_eigenvector).t()  # [S, V]
        belief, words = self.initial_state[None], torch.empty(1, 0, dtype=torch.int64)
        for _ in range(depth):
            prob = belief @ emit  # [N, V]
            if prob.min() < -1e-9:
                n, token = divmod(int(prob.argmin()), self.vocab_size)
                raise ProcessError(f"{self.name} is no process: after {words[n].tolist()} the token {token} has the "
                                   f"negative weight {prob.min():.3g}")
            parent, token, belief, _ = self.children(belief, torch.ones_like(belief[:, 0]))
            _, first = _unique(belief)
            first = first[(belief[first] @ emit).min(1).values.argsort()[:beam]]
            belief, words = belief[first], torch.cat([words[parent[first]], token[first, None]], 1)


def _keys(belief: torch.Tensor) -> torch.Tensor:
    """[N] int64 hashes of beliefs [N, S]; beliefs that agree to about 1e-10 have the same one."""
    odd = torch.from_numpy(np.random.default_rng(0).integers(2**62, size=belief.shape[1]) * 2 + 1).to(belief.device)
    return ((belief * 1e10).round().long() * odd).sum(1)


def _unique(belief: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(group of each belief [N], one member of each group [G])."""
    _, group = torch.unique(_keys(belief), return_inverse=True)
    member = torch.empty(int(group.max()) + 1, dtype=torch.int64, device=belief.device)
    return group, member.scatter_(0, group, torch.arange(len(group), device=belief.device))


def _merge(belief: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equal beliefs [N, S] become one, their weights [N] add up."""
    group, member = _unique(belief)
    return belief[member], torch.zeros_like(weight[: len(member)]).index_add_(0, group, weight)


def _limit(chain):
    """lim (I + P)^n / 2^n of a stochastic matrix P [N, N]: row i is where a chain from i is found in the long run."""
    P = torch.as_tensor(chain)
    P = (torch.eye(len(P)).to(P) + P) / 2  # lazy, hence aperiodic: the limit exists and is P's time average
    for _ in range(60):
        P = P @ P
        P = P / P.sum(1, keepdim=True)
    return P


def _normalize(T: np.ndarray, name: str, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale a stack to principal eigenvalue 1; return it with its right and left eigenvectors r and pi."""
    M = T.sum(0)
    values, right = np.linalg.eig(M)
    real = np.where(np.abs(values.imag) < 1e-9, values.real, -np.inf)
    top = int(real.argmax())
    if not real[top] > 1e-12 or np.abs(values).max() > real[top] * (1 + 1e-7):
        raise ProcessError(f"{name} is no process: sum_x T[x] has the eigenvalues {np.round(values, 4).tolist()}; "
                           "the one of largest modulus must be real and positive")
    T, M = T / real[top], M / real[top]
    if (np.abs(values / real[top] - 1) < 1e-8).sum() > 1:  # several ergodic components
        if start is None or not ((T >= 0).all() and np.allclose(M.sum(1), 1)):
            raise ProcessError(f"{name} has several stationary states: say where it starts with initial_state, "
                               "or build it as process='nonergodic' from components")
        pi = start @ _limit(M).numpy()
        return T, np.ones(len(M)), pi / pi.sum()
    r = right[:, top].real
    left_values, left = np.linalg.eig(M.T)
    pi = left[:, int(np.abs(left_values - 1).argmin())].real
    if abs(r.sum()) < 1e-12 or abs(pi.sum()) < 1e-12 or abs(pi @ r) < 1e-12:
        raise ProcessError(f"{name} is no process: its stationary state has no weight")
    return T, r * len(r) / r.sum(), pi / pi.sum()


def parameters(process: str | None = None) -> list[str]:
    """Names of the parameters of a process, or of all processes: the signatures of PROCESSES say them."""
    special = {"nonergodic": ["components"], "custom": ["matrices"]}
    if process is not None:
        return special.get(process) or list(inspect.signature(PROCESSES[process]).parameters)
    every = [name for function in PROCESSES.values() for name in inspect.signature(function).parameters]
    return list(dict.fromkeys(["components", "matrices", *every]))


def make_process(name: str = "mess3", *, initial_state=None, add_bos: bool = False, add_eos: bool = False,
                 eos_prob: float = 0.05, **params) -> Process:
    """Build a process by name.

    name: one of PROCESSES with its parameters; "custom" with matrices=PATH (.npy, .npz) or a nested list [V, S, S];
        "nonergodic" with components=[{"process": NAME, "weight": 1, "vocab_map": [token, ...], ...params}, ...].
    initial_state: [S], where sequences start instead of the stationary state.
    add_eos: a token V that ends the sequence with probability eos_prob at every step, after which it starts anew.
    add_bos: a further token that begins each sequence. Both are part of the stack, so everything stays exact.
    Raises ProcessError, naming the allowed range or the known processes.
    """
    try:
        if name == "nonergodic":
            process = _mixture(initial_state=initial_state, **_only(name, params, "components"))
        elif name == "custom":
            process = Process(_read_matrices(**_only(name, params, "matrices")), initial_state)
        elif name in PROCESSES:
            params = _only(name, params, *inspect.signature(PROCESSES[name]).parameters)
            process = Process(PROCESSES[name](**params), initial_state, name=name)
        else:
            near = difflib.get_close_matches(str(name), [*PROCESSES, "nonergodic", "custom"], n=1)
            raise ProcessError(f"unknown process {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
                               + f" Known: {', '.join(PROCESSES)}, nonergodic, custom")
    except ProcessError:
        raise
    except (TypeError, ValueError, OverflowError) as e:  # a parameter of another type, or far out of range
        given = {**params, "initial_state": initial_state} if initial_state is not None else params
        raise ProcessError(f"process {name} cannot be built from {given}: {e}") from e
    return _framed(process, add_bos, eos_prob if add_eos else 0.0) if add_bos or add_eos else process


def _only(name: str, params: dict, *allowed: str) -> dict:
    for key in params:
        if key not in allowed:
            raise ProcessError(f"process {name} has no parameter {key!r}: it takes {', '.join(allowed) or 'none'}")
    return params


def _read_matrices(matrices=None) -> np.ndarray:
    """A stack [V, S, S] from a nested list or from an .npy or .npz file (the only array in it, or `matrices`)."""
    if matrices is None or (isinstance(matrices, str) and not matrices):
        raise ProcessError("process custom needs matrices: a nested list [V, S, S] or the path of an .npy or .npz file")
    try:
        if not isinstance(matrices, (str, Path)):
            return np.asarray(matrices, dtype=np.float64)
        data = np.load(matrices, allow_pickle=False)
        if isinstance(data, np.lib.npyio.NpzFile):
            names = data.files
            data = data["matrices" if "matrices" in names or len(names) != 1 else names[0]]
        if not np.isrealobj(data):
            raise ValueError("the numbers are complex")
        return np.asarray(data, dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        source = matrices if isinstance(matrices, (str, Path)) else "the nested list"
        raise ProcessError(f"cannot read matrices from {source}: {e}; expected numbers of shape [V, S, S]") from e


def _mixture(components: list | None = None, initial_state=None) -> Process:
    """A process that draws one of its components once and stays in it: block-diagonal, not ergodic."""
    if not components:
        raise ProcessError("process nonergodic needs components: a list of {'process': NAME, 'weight': 1, ...}")
    parts, maps, weights = [], [], []
    for i, component in enumerate(components):
        if not isinstance(component, dict) or "process" not in component:
            raise ProcessError(f"components[{i}] = {component!r}: expected {{'process': NAME, ...}}")
        spec = dict(component)
        weights.append(spec.pop("weight", 1.0))
        vocab_map = spec.pop("vocab_map", None)
        parts.append(make_process(spec.pop("process"), **spec))
        maps.append(list(range(parts[-1].vocab_size)) if vocab_map is None else list(vocab_map))
        if len(set(maps[-1])) != parts[-1].vocab_size or not all(isinstance(x, int) and x >= 0 for x in maps[-1]):
            raise ProcessError(f"components[{i}]: vocab_map = {maps[-1]} needs {parts[-1].vocab_size} distinct tokens")
        if not weights[-1] > 0:
            raise ProcessError(f"components[{i}]: weight = {weights[-1]} must be positive")
    S, V = sum(p.num_states for p in parts), 1 + max(max(m) for m in maps)
    T, start, pi, at = np.zeros((V, S, S)), np.zeros(S), np.zeros(S), 0
    for part, vocab_map, weight in zip(parts, maps, np.array(weights) / sum(weights), strict=True):
        block = slice(at, at := at + part.num_states)
        T[vocab_map, block, block] = part.transition_matrices.numpy()
        start[block] = weight * part.initial_state.numpy()
        pi[block] = weight * (part.stationary_state / (part.stationary_state @ part.normalizing_eigenvector)).numpy()
    r = np.concatenate([p.normalizing_eigenvector.numpy() for p in parts])
    name = "nonergodic(" + " + ".join(p.name for p in parts) + ")"
    return Process(T, start if initial_state is None else initial_state, r, pi / pi.sum(), name)


def _framed(process: Process, add_bos: bool, eos_prob: float) -> Process:
    """The process with tokens for the end (V) and the beginning (the last one) of a sequence.

    EOS turns weight v T[x] into (1 - e) v T[x] and adds e (v . r) times the start, which leaves r the eigenvector.
    """
    _probabilities(eos_prob=eos_prob)
    V, S = process.vocab_size, process.num_states
    r, start = process.normalizing_eigenvector.numpy(), process.initial_state.numpy()
    T = np.zeros((V + (eos_prob > 0) + add_bos, S + add_bos, S + add_bos))
    T[:V, :S, :S] = (1 - eos_prob) * process.transition_matrices.numpy()
    begin = np.append(start, 0.0) if add_bos else start
    if add_bos:
        T[-1, S, :S], begin, r = start, np.eye(S + 1)[S], np.append(r, 1.0)
    if eos_prob > 0:
        T[V, :S] = eos_prob * np.outer(r[:S], begin)
        M = T.sum(0)
        pi = np.linalg.lstsq(np.vstack([M.T - np.eye(len(M)), r]), np.eye(len(M) + 1)[-1], rcond=None)[0]
    else:
        pi = np.append(process.stationary_state.numpy(), 0.0)
    return Process(T, begin, r, pi / pi.sum(), process.name)
