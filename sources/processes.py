"""Generalized hidden Markov processes: the zoo, sampling, exact beliefs, likelihoods and entropies, mixtures, framing.

A process is a stack T[x][i, j] = weight of "emit token x and go to state j, from state i". With v the row vector of
where it starts and r the column of what all futures of a state weigh, the word w has the probability

    p(w) = v T[w1] T[w2] ... T[wL] r

and what matters of the past for the future is the belief v T[w1] ... T[wL], scaled to belief . r = 1.

Dimensions: B batch, L tokens, V tokens of the vocabulary, S states, N words or beliefs.
"""

import hashlib
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.errors import InputError, reason, regular_file
from sources.arrays import read_array
from sources.shared import closest, counted


class ProcessError(InputError):
    """A process that was asked for cannot exist; the message says why and what is allowed."""


def _probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ProcessError(f"{name} = {value:g} is no probability: use a value in [0, 1]")


# ---------------------------------------------------------------------------------------------------------------
# The zoo. A function's name is the process's name, its parameters are the process's; it returns the stack [V, S, S].
# ---------------------------------------------------------------------------------------------------------------
def coin(p: float = 0.5) -> np.ndarray:
    """A biased coin: emits 0 with probability p. One state."""
    _probabilities(p=p)
    return np.array([[[p]], [[1 - p]]])


def even_ones(p: float = 0.5) -> np.ndarray:
    """The even process (Weiss 1973): runs of ones have even length. Two states: between runs, inside a pair."""
    _probabilities(p=p)
    zero = [[1 - p, 0], [0, 0]]
    one = [[0, p], [1, 0]]
    return np.array([zero, one])


def no_consecutive_ones(p: float = 0.5) -> np.ndarray:
    """The golden-mean process: a one is followed by a zero. Two states: free, just after a one."""
    _probabilities(p=p)
    zero = [[1 - p, 0], [1, 0]]
    one = [[0, p], [0, 0]]
    return np.array([zero, one])


def zero_one_random(p: float = 0.5) -> np.ndarray:
    """0, 1, then a random bit (1 with probability p), over and over; the phase is hidden. Three states."""
    _probabilities(p=p)
    zero = [[0, 1, 0], [0, 0, 0], [1 - p, 0, 0]]
    one = [[0, 0, 0], [0, 0, 1], [p, 0, 0]]
    return np.array([zero, one])


def sns(p: float = 0.5, q: float = 0.5) -> np.ndarray:
    """The simple nonunifilar source: two states, infinitely many beliefs (Crutchfield 1994)."""
    _probabilities(p=p, q=q)
    zero = [[1 - p, p], [0, 1 - q]]
    one = [[0, 0], [q, 0]]
    return np.array([zero, one])


def mess3(x: float = 0.05, a: float = 0.85) -> np.ndarray:
    """Mess3 (Marzen and Crutchfield 2017): three states, and beliefs that form a fractal in the simplex.

    T[k][i, j] = (probability x of moving to each other state, 1 - 2x of staying) * (a if j == k else (1 - a) / 2).
    """
    _probabilities(a=a)
    if not 0 <= x <= 0.5:
        raise ProcessError(f"x = {x:g} leaves a negative probability of staying, 1 - 2x: use a value in [0, 0.5]")
    identity = np.eye(3)
    move = np.where(identity, 1 - 2 * x, x)  # [from, to]
    emit = np.where(identity, a, (1 - a) / 2)  # [token, to]
    return emit[:, None, :] * move


def rrxor(p1: float = 0.5, p2: float = 0.5) -> np.ndarray:
    """Two random bits, then their exclusive or (Crutchfield and Feldman 2003). States S, 0, 1, T, F."""
    _probabilities(p1=p1, p2=p2)
    start, zero, one, true, false = range(5)
    T = np.zeros((2, 5, 5))
    T[0, start, zero] = p1  # the first bit
    T[1, start, one] = 1 - p1
    T[0, zero, false] = p2  # the second bit
    T[1, zero, true] = 1 - p2
    T[0, one, true] = p2
    T[1, one, false] = 1 - p2
    T[1, true, start] = 1  # their exclusive or
    T[0, false, start] = 1
    return T


def leaky_rrxor(p1: float = 0.5, p2: float = 0.5, epsilon: float = 0.1) -> np.ndarray:
    """rrxor that jumps, with probability epsilon, to any of the 5 states under any of the 2 tokens."""
    _probabilities(epsilon=epsilon)
    return (1 - epsilon) * rrxor(p1, p2) + epsilon / 10


def matching_parens(open_probs: list = (1.0, 0.5, 0.4)) -> np.ndarray:
    """Nested parentheses: 0 opens with probability open_probs[depth], 1 closes. States are depths."""
    open_probs = [float(p) for p in open_probs]
    if open_probs and open_probs[-1] != 0:
        open_probs = [*open_probs, 0.0]  # the deepest level only closes
    if len(open_probs) < 2 or open_probs[0] != 1:
        raise ProcessError(f"open_probs = {open_probs}: at depth 0 one can only open, so it must start with 1")
    for depth, probability in enumerate(open_probs):
        _probabilities(**{f"open_probs[{depth}]": probability})
    p = np.array(open_probs)
    deeper = np.diag(p[:-1], 1)
    less_deep = np.diag(1 - p[1:], -1)
    return np.stack([deeper, less_deep])


def mr_name(p: float = 0.4, q: float = 0.25) -> np.ndarray:
    """Tokens Mr., Something, Blah, name; the state is the last token, so T[k][i, j] = chain[i, j] if j == k."""
    _probabilities(p=p, q=q, **{"1 - p - q": 1 - p - q})
    s = 1 - p - q
    chain = np.array([
        [0, 0, 0, 1],  # Mr. -> name
        [q, s, p, 0],  # Something -> Mr., Something, Blah
        [q, p, s, 0],  # Blah
        [0, 0.5, 0.5, 0],  # name -> Something, Blah
    ])
    return np.eye(4)[:, None, :] * chain


def days_of_week() -> np.ndarray:
    """Tokens M Tu W Th F Sa Su Tmrw Yest Wknd Wkdy; the state is the day the last token spoke of."""
    tomorrow, yesterday, weekend, weekday = 7, 8, 9, 10
    T = np.zeros((11, 7, 7))
    for day in range(7):
        for named in range(7):
            is_next = named == (day + 1) % 7
            T[named, day, named] = 5 if is_next else 1
        T[tomorrow, day, (day + 1) % 7] = 1
        T[yesterday, day, (day - 1) % 7] = 1
        T[weekend, day, 5:] = 1 / 2
        T[weekday, day, :5] = 1 / 5
    weight = T.sum((0, 2))  # [day] of all tokens
    return T / weight[:, None]


def tom_quantum(alpha: float = 1.0, beta: float = 7.14) -> np.ndarray:
    """Tom's quantum process: a qubit seen through four outcomes; no finite hidden Markov model generates it.

    With g = 1 / 4(alpha^2 + beta^2), a token keeps d = 1/4 of the weight in one plane of the Bloch ball, turns o =
    2 alpha beta g of it by the sign of the outcome, and shrinks the third axis by m = (alpha^2 - beta^2) g.
    """
    if not alpha**2 + beta**2 > 0:
        raise ProcessError("alpha and beta are both 0: one of them must not be")
    g = 1 / (4 * (alpha**2 + beta**2))
    d = 1 / 4
    m = (alpha**2 - beta**2) * g
    o = 2 * alpha * beta * g
    return np.array([
        [[d, 0, o], [0, m, 0], [o, 0, d]],
        [[d, 0, -o], [0, m, 0], [-o, 0, d]],
        [[d, o, 0], [o, d, 0], [0, 0, m]],
        [[d, -o, 0], [-o, d, 0], [0, 0, m]],
    ])


def fanizza(alpha: float = 2000.0, lamb: float = 0.49) -> np.ndarray:
    """The process of Fanizza et al. (2024) that four real dimensions generate and no finite hidden Markov model.

    Token 1 turns a plane by the angle alpha and shrinks it by lamb: its probability oscillates with the number of ones
    since the last token 0, which starts anew from pi0. w is what all futures of a dimension weigh.
    """
    if not 0 < lamb < 1:
        raise ProcessError(f"lamb = {lamb:g}: use a value in (0, 1); up to 0.5 all words have non-negative weight")
    c = math.cos(alpha)
    s = math.sin(alpha)
    det = 1 - 2 * lamb * c + lamb**2
    A = (1 - lamb * c + lamb * s) / det
    B = (1 - lamb * c - lamb * s) / det
    pi0 = np.array([
        1 - (2 / (1 - lamb) - A - B) / 4,
        1 / (2 * (1 - lamb)),
        -A / 4,
        -B / 4,
    ])
    w = np.array([
        1,
        1 - lamb,
        1 + lamb * (s - c),
        1 - lamb * (s + c),
    ])
    T0 = np.outer(w, pi0)
    T1 = np.zeros((4, 4))
    T1[1, 1] = 1
    T1[2:, 2:] = [[c, -s], [s, c]]
    return np.stack([T0, lamb * T1])


def post_quantum(log_alpha: float = 1.0, beta: float = 0.5) -> np.ndarray:
    """A process beyond quantum theory: three real dimensions, no finite-dimensional quantum model (Fanizza 2024).

    Tokens 1 and 2 act by M(v) = [[v, 0, 0], [0, 1, 0], [0, ln v, 1]], v = alpha > 1 > beta: logarithms count them.
    """
    if not (log_alpha > 0 and 0 < beta < 1):
        raise ProcessError(f"log_alpha = {log_alpha:g}, beta = {beta:g}: needs log_alpha > 0 and 0 < beta < 1")
    alpha = math.exp(log_alpha)
    ratio = log_alpha / math.log(beta)
    if abs(alpha + beta - 2) < 1e-12 or abs(ratio - round(ratio)) < 1e-12:
        raise ProcessError(
            f"log_alpha = {log_alpha:g}, beta = {beta:g}: needs exp(log_alpha) + beta != 2 and "
            "log_alpha / log(beta) no integer"
        )
    restart = np.outer([1, 1, 0], [1, -1, -1])
    grow = [[alpha, 0, 0], [0, 1, 0], [0, log_alpha, 1]]
    shrink = [[beta, 0, 0], [0, 1, 0], [0, math.log(beta), 1]]
    return np.stack([restart, grow, shrink])


ZOO = (
    coin,
    even_ones,
    no_consecutive_ones,
    zero_one_random,
    sns,
    mess3,
    rrxor,
    leaky_rrxor,
    matching_parens,
    mr_name,
    days_of_week,
    tom_quantum,
    fanizza,
    post_quantum,
)
PROCESSES = {function.__name__: function for function in ZOO}
MOST_SHOWN = 500  # characters of a setting in a message
COMPOSED = {"nonergodic": ("components",), "custom": ("matrices",)}  # built from other processes, or read


def parameters(process: str) -> tuple[str, ...]:
    """Names of the parameters of a process; of one in PROCESSES its signature says them."""
    if process in PROCESSES:
        return tuple(inspect.signature(PROCESSES[process]).parameters)
    return COMPOSED.get(process, ())


def all_parameters() -> set[str]:
    """Names of the parameters of all processes."""
    names = set()
    for process in [*PROCESSES, *COMPOSED]:
        names.update(parameters(process))
    return names


def listing() -> str:
    """All processes with their parameters' defaults and what they are, a line each, for --help."""
    lines = ["processes, with the defaults of their parameters"]
    for name, function in PROCESSES.items():
        told = (inspect.getdoc(function) or "").splitlines() or [""]
        takes = inspect.signature(function).parameters.values()
        defaults = [str(each.replace(annotation=each.empty)) for each in takes]  # "x=0.05"
        lines.append(f"  {name}({', '.join(defaults)})  {told[0]}")
    lines.append("  nonergodic(components)  draws one of its components once and stays in it")
    lines.append("  custom(matrices)  your own: an .npy or .npz file or a nested list [V, S, S], see matrices above")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# A process
# ---------------------------------------------------------------------------------------------------------------
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


IMPOSSIBLE = 1e-13  # where weights may be negative, a probability below this is rounding of an exact 0
MOST_BELIEFS = 2**25  # numbers of beliefs at a time
RESCALE = 16  # tokens between two rescalings of a belief, or fewer: float64 holds the product of so many probabilities


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
    Attributes:
        fingerprint: 16 hex digits of matrices as they were read, where settings only say from where; else "".
        notes: what was done to the matrices and should be said.
        state_names: [S], what pictures call the states, or dimensions where they are no hidden states.
    Raises:
        ProcessError: if the stack is no process: wrong shape, not finite, no positive principal eigenvalue, several
            stationary states and no initial_state, or a word of negative weight.
    """

    def __init__(
        self,
        matrices,
        initial_state=None,
        eigenvector=None,
        stationary=None,
        name: str = "custom",
    ):
        T = np.asarray(matrices, dtype=np.float64)
        if T.ndim != 3 or T.shape[1] != T.shape[2] or 0 in T.shape:
            raise ProcessError(f"{name}: matrices have shape {list(T.shape)}; expected [V, S, S], a square matrix "
                               "for each token")
        if not np.isfinite(T).all():
            raise ProcessError(f"{name}: matrices hold NaN or infinite weights")
        self.name = name
        self.fingerprint = ""
        self.notes = []
        self.vocab_size = T.shape[0]
        self.num_states = T.shape[1]
        start = None
        if initial_state is not None:
            start = np.asarray(initial_state, dtype=np.float64)
            if start.shape != (self.num_states,) or not np.isfinite(start).all():
                numbers = counted(self.num_states, "number")
                raise ProcessError(f"{name}: initial_state must be {numbers}, finite and one a state")
        if eigenvector is None:
            T, r, pi = _normalize(T, name, start)
        else:
            r = np.asarray(eigenvector, dtype=np.float64)
            pi = np.asarray(stationary, dtype=np.float64)
        if start is None:
            start = pi
        if not start @ r > 0:
            raise ProcessError(f"{name}: initial_state must have positive weight")
        # No negative weight, and rows of M that sum to 1: weights are probabilities, and a belief is a posterior.
        self.is_hmm = bool((T >= 0).all() and np.allclose(r, 1, atol=1e-9))
        if self.is_hmm and (start < 0).any():
            raise ProcessError(f"{name}: initial_state holds a negative probability")
        kind = "state" if self.is_hmm else "dimension"
        self.state_names = [f"{kind} {i}" for i in range(self.num_states)]
        # Sums of products without a sign are 0 only where nothing can be: the rarest event keeps its probability.
        self.impossible = IMPOSSIBLE
        if (T >= 0).all() and (start >= 0).all() and r.min() > 1e-9:
            self.impossible = 0.0
        # So many of the smallest weights have a product that float64 holds.
        digits = -np.log10(np.abs(T[T != 0]).min())
        self.rescale = int(np.clip(250 / max(digits, 1), 1, RESCALE))
        self.transition_matrices = torch.from_numpy(T.copy())
        self.normalizing_eigenvector = torch.from_numpy(r.copy())
        self.stationary_state = torch.from_numpy(pi.copy())
        self.initial_state = torch.from_numpy(start / (start @ r))
        self._build_tables()
        if self.is_hmm:
            self._build_edges()
        else:
            self._check_words()

    def _build_tables(self) -> None:
        """One matrix that, on a column of beliefs, gives all that a step of sampling or filtering looks up."""
        T = self.transition_matrices
        r = self.normalizing_eigenvector
        emit = (T @ r).cumsum(0)  # [V, S] running sums over tokens of p(token | state)
        successors = T.transpose(1, 2).reshape(-1, self.num_states)  # [V*S, S] belief after each token, not scaled
        self._step = torch.cat([emit, successors])

    def _build_edges(self) -> None:
        """The interval [0, 1) of each state of a hidden Markov model, cut into its outcomes (token, next state).

        The intervals of all states lie on one line, state s from 2s on: one search for u + 2s finds the outcome.
        """
        S = self.num_states
        joint = self.transition_matrices.permute(1, 0, 2).reshape(S, -1)  # [S, V*S] p(token, next state | state)
        joint_sums = joint.sum(1, keepdim=True)  # 1 but for rounding
        # Only what can be has an interval: an outcome of probability 0 is never found.
        state, outcome = joint.nonzero(as_tuple=True)
        upper = (joint / joint_sums).cumsum(1)[state, outcome]
        # The last outcome of state s ends at 2s + 1.5, not 2s + 1: slack that keeps u + 2s, rounded up, out of the next
        # state's interval.
        is_last = torch.ones_like(state, dtype=torch.bool)
        is_last[:-1] = state[1:] != state[:-1]
        self._edges = torch.where(is_last, 1.5, upper) + 2 * state
        self._edge_token = outcome // S
        self._edge_next = outcome % S
        self._edge_offset = 2.0 * self._edge_next
        # The starting state is drawn likewise: the upper ends of all states but the last.
        start_sums = self.initial_state.cumsum(0) / self.initial_state.sum()
        self._start_edges = start_sums[:-1].contiguous()

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

    def sample(
        self,
        batch: int,
        length: int,
        generator: torch.Generator | None = None,
        return_states: bool = False,
    ):
        """Draw tokens [batch, length] (int64); with return_states also the hidden path [batch, length + 1].

        Raises ProcessError if states are asked of a process that is no hidden Markov model.
        """
        if return_states and not self.is_hmm:
            raise ProcessError(f"{self.name} has no hidden path: its weights are no probabilities of states")
        uniforms = torch.rand(
            length + 1,  # one for the starting state
            batch,
            generator=generator,
            dtype=torch.float64,
            device=self.device,
        )
        tokens, path = self.generate(uniforms, whole_path=return_states)
        if return_states:
            return tokens, path
        return tokens

    def generate(self, uniforms: torch.Tensor, start: torch.Tensor | None = None, whole_path: bool = False):
        """Turn uniforms [L + 1, B] into tokens [B, L], by inverting the distribution function at every step.

        Row 0 draws the starting state, unless `start` continues an earlier call. Returns the tokens and what to
        continue from: a hidden Markov model's last states [B] (or whole path, [B, L + 1]), else the beliefs [B, S].
        """
        length = uniforms.shape[0] - 1
        batch = uniforms.shape[1]
        if not self.is_hmm:
            return self._generate_by_belief(uniforms[1:], start)
        if start is None:
            start = torch.searchsorted(self._start_edges, uniforms[0], right=True)
        # The hot loop: one search among the outcomes of all states, three kernels a token.
        chosen = torch.empty(length, batch, dtype=torch.int64, device=self.device)
        offset = 2.0 * start  # where the interval of the state begins
        for t in range(length):
            torch.searchsorted(self._edges, uniforms[t + 1] + offset, right=True, out=chosen[t])
            offset = self._edge_offset[chosen[t]]
        # Tokens and states are looked up once, outside the loop.
        tokens = self._edge_token[chosen].t().contiguous()
        if whole_path:
            states = torch.cat([start[None], self._edge_next[chosen]])
            return tokens, states.t()
        return tokens, (0.5 * offset).long()

    def can_start_from(self, start: torch.Tensor) -> bool:
        """Whether generate can go on from there: states [B] of a hidden Markov model, else beliefs [B, S]."""
        if self.is_hmm:
            return start.ndim == 1 and 0 <= int(start.min()) <= int(start.max()) < self.num_states
        return start.ndim == 2 and start.shape[1] == self.num_states

    def _generate_by_belief(self, uniforms: torch.Tensor, start: torch.Tensor | None):
        """Sampling where only the belief is known: the states of a GHMM are no random variables."""
        length, batch = uniforms.shape
        V = self.vocab_size
        S = self.num_states
        if start is None:
            belief = self.initial_state[:, None].expand(S, batch)
        else:
            belief = start.t()
        belief = belief.contiguous()  # [S, B]
        tokens = torch.empty(length, batch, dtype=torch.int64, device=self.device)
        for t in range(length):
            # One product gives b T[x] for every token x, and the running sums over x of its weight b T[x] r.
            step = self._step @ belief  # [V + V*S, B]
            sums = step[:V]
            successors = step[V:].view(V, S, batch)
            total = sums[-1]  # b . r; 1 if the belief were scaled
            # The token whose interval of the running sums holds u times their total.
            token = (uniforms[t] * total >= sums[:-1]).sum(0)
            following = successors.gather(0, token.expand(1, S, batch))[0]
            belief = following / total
            tokens[t] = token
        # Each division scales the belief before the token, so it lags a step; the last is still due.
        belief = belief / (self.normalizing_eigenvector @ belief)
        return tokens.t().contiguous(), belief.t()

    # Filtering -------------------------------------------------------------------------------------------------

    def _filter(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Beliefs [L + 1, S, B] and p(token | before) [L, B] of tokens [B, L], time first for contiguous rows.

        The belief is updated by b <- b T[x] / (b T[x] r), whose denominator is p(x | before); b . r = 1 then holds
        again. After an impossible token both are meaningless.
        """
        tokens = self._checked(tokens)
        batch, length = tokens.shape
        V = self.vocab_size
        S = self.num_states
        r = self.normalizing_eigenvector
        columns = tokens.t().contiguous()  # [L, B]
        successors = self._step[V:]  # [V*S, S]
        beliefs = torch.empty(length + 1, S, batch, dtype=torch.float64, device=self.device)
        beliefs[0] = self.initial_state[:, None]
        probs = torch.empty(length, batch, dtype=torch.float64, device=self.device)
        # Weighing and dividing after every token would add three kernels to the loop's two: 16 tokens share them.
        for begin in range(0, length, self.rescale):
            end = min(begin + self.rescale, length)
            # The update of a belief: b <- b T[x]. One product gives it for all V tokens, x picks its own.
            for t in range(begin, end):
                following = (successors @ beliefs[t]).view(V, S, batch)
                token = columns[t].expand(1, S, batch)
                torch.gather(following, 0, token, out=beliefs[t + 1][None])
            # The weight b . r is the probability of the tokens since the last rescaling; neighbours' ratio is that of
            # one token given those before it.
            weights = r @ beliefs[begin : end + 1]  # [t, B]
            torch.div(weights[1:], weights[:-1], out=probs[begin:end])
            # Now every belief of the stretch is scaled to b . r = 1.
            beliefs[begin + 1 : end + 1] /= weights[1:, None]
        return beliefs, probs

    def _checked(self, tokens) -> torch.Tensor:
        """Tokens [B, L] as int64 on the process's device. Raises ProcessError for another shape or vocabulary."""
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        if tokens.ndim != 2:
            raise ProcessError(f"tokens have shape {list(tokens.shape)}; expected [B, L]")
        if not tokens.numel():
            return tokens
        least = int(tokens.min())
        largest = int(tokens.max())
        if least < 0 or largest >= self.vocab_size:
            raise ProcessError(f"tokens of {self.name} are 0..{self.vocab_size - 1}; got {least}..{largest}")
        return tokens

    def beliefs(self, tokens) -> torch.Tensor:
        """Predictive state before each token and after the last, [B, L + 1, S], for tokens [B, L].

        Raises ProcessError for a word of probability 0, naming the first token that cannot be.
        """
        beliefs, probs = self._filter(tokens)
        impossible = ~(probs > self.impossible)  # NaN too
        if impossible.any():
            t, b = impossible.nonzero()[0].tolist()
            word = self._checked(tokens)[b, : t + 1].tolist()
            before = word[max(0, t - 8) : -1]
            raise ProcessError(
                f"token {word[-1]} at position {t} of sequence {b} is impossible under {self.name} "
                f"after {before}: no belief follows it"
            )
        return beliefs.permute(2, 0, 1)

    def log_prob(self, tokens) -> torch.Tensor:
        """log p(token | tokens before it) in nats, [B, L]; -inf from the first impossible token on."""
        _, probs = self._filter(tokens)
        possible = probs > self.impossible
        if not possible.all():  # nothing follows an impossible word, whatever 0/0 gave
            still_possible = possible.long().cumprod(0).bool()
            probs = torch.where(still_possible, probs, 0)
        return probs.log().t()

    def word_probability(self, word) -> float:
        """Probability that a sequence from the initial state begins with the word."""
        word = [int(token) for token in word]
        if not word:
            return 1.0
        return math.exp(self.log_prob([word]).sum())

    def next_token_probs(self, belief) -> torch.Tensor:
        """p(next token x | belief) = belief T[x] r, [..., V] for beliefs [..., S]."""
        belief = torch.as_tensor(belief, dtype=torch.float64, device=self.device)
        emit = (self.transition_matrices @ self.normalizing_eigenvector).t()  # [S, V]
        return (belief @ emit).clamp_min(0)  # rounding may leave an exact 0 below 0

    # Words and entropies ---------------------------------------------------------------------------------------

    def children(self, belief: torch.Tensor, weight: torch.Tensor):
        """All possible one-token continuations of beliefs [N, S]: (parent, token, belief, weight), parent-major."""
        joint = torch.einsum("ns,vsj->nvj", belief, self.transition_matrices)  # b T[x]
        prob = joint @ self.normalizing_eigenvector  # [N, V] p(x | b)
        parent, token = (prob > self.impossible).nonzero(as_tuple=True)
        prob = prob[parent, token]
        child = joint[parent, token] / prob[:, None]
        return parent, token, child, weight[parent] * prob

    def all_words(self, length: int, max_words: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(words [N, length] in lexicographic order, probabilities [N]) of all that can be; None beyond max_words."""
        words = torch.empty(1, 0, dtype=torch.int64, device=self.device)
        belief = self.initial_state[None]
        weight = torch.ones_like(belief[:, 0])
        for _ in range(length):
            parent, token, belief, weight = self.children(belief, weight)
            if len(token) > max_words:
                return None
            words = torch.cat([words[parent], token[:, None]], 1)
        return words, weight

    def _levels(
        self,
        depth: int,
        max_nodes: int,
        belief: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (beliefs [N, S], weights [N]) of all words of length 0, 1, ..., depth, equal beliefs merged.

        Starts from the initial state unless told otherwise; stops early where a level could exceed max_nodes.
        """
        if belief is None:
            belief = self.initial_state[None]
        if weight is None:
            weight = torch.ones_like(belief[:, 0])
        for length in range(depth + 1):
            yield belief, weight
            if length == depth or len(belief) * self.vocab_size > max_nodes:
                return
            _, _, belief, weight = self.children(belief, weight)
            belief, weight = _merge(belief, weight)

    def _entropy(self, belief: torch.Tensor) -> torch.Tensor:
        """Entropy in nats of the next token, [...] for beliefs [..., S]."""
        probs = self.next_token_probs(belief)
        entropy = torch.special.entr(probs).sum(-1)  # entr(p) = -p log p, and 0 where p is 0
        return entropy.clamp_min(0)  # a certain token may have a probability of 1 and a rounding

    def entropies(
        self,
        length: int,
        max_nodes: int = 300_000,
        samples: int = 20_000,
        seed: int = 0,
    ) -> list[Estimate]:
        """H(next token | the first l tokens) for l = 0..length: exact while enumeration fits in max_nodes.

        Beyond that, the mean over sampled words of the entropy of the exact prediction, with its standard error.
        """
        # H(next | l tokens) = sum over words w of length l of p(w) H(next | belief after w). What is to come depends
        # on the word by its belief alone, so words of one belief count as one: V^l words become few, or stay few.
        estimates = []
        for belief, weight in self._levels(length, max_nodes):
            mean = float(weight @ self._entropy(belief))
            estimates.append(Estimate(mean))
        if len(estimates) <= length:
            # The same sum by sampled words: each entropy is exact, only their mean is not.
            generator = torch.Generator(self.device).manual_seed(seed)
            tokens = self.sample(samples, length, generator)
            # A block of words at a time: beliefs of them all would fill the memory where they are long.
            at_once = max(1, MOST_BELIEFS // (length * self.num_states))
            parts = []
            for block in tokens.split(at_once):
                beliefs, _ = self._filter(block)
                late = beliefs[len(estimates) :].transpose(1, 2)  # [l, block, S] of the lengths that are left
                parts.append(self._entropy(late))
            entropy = torch.cat(parts, 1)  # [l, samples]
            errors = entropy.std(1) / samples**0.5
            estimates += map(Estimate, entropy.mean(1).tolist(), errors.tolist())
        return estimates

    def myopic_entropy(self, length: int, max_nodes: int = 300_000) -> Estimate:
        """H(next token | first `length` tokens) in nats; `.error` is 0 if exact, else a standard error."""
        return self.entropies(length, max_nodes)[-1]

    def optimal_loss(self, length: int, max_nodes: int = 300_000) -> torch.Tensor:
        """[length]: the least loss a model can have at each position, having read 1, 2, ..., length tokens."""
        return torch.tensor(self.entropies(length, max_nodes)[1:], dtype=torch.float64)

    def entropy_rate(
        self,
        max_nodes: int = 100_000,
        samples: int = 2_000,
        length: int = 1_000,
    ) -> Estimate:
        """Entropy per token in the limit, in nats, with an error.

        Finitely many beliefs: the average over the chain of beliefs, exact. A hidden Markov model otherwise: halfway
        between two bounds, with half the gap as error. Failing both, Monte Carlo and its standard error.
        """
        chain = self._belief_chain()
        if chain is not None:
            beliefs, transitions = chain
            visits = _limit(transitions)[0]  # [N] how often each belief is held, in the long run
            return Estimate(visits @ self._entropy(beliefs))
        if self.is_hmm:
            lower, upper = self._entropy_rate_bounds(max_nodes)
            if upper - lower < 1e-3:
                middle = (upper + lower) / 2
                error = max(0.0, upper - lower) / 2
                return Estimate(middle, error)
        generator = torch.Generator(self.device).manual_seed(0)
        tokens = self.sample(samples, length, generator)
        beliefs, _ = self._filter(tokens)
        late = beliefs[length // 2 :].transpose(1, 2)  # [length / 2, samples, S], when the start is forgotten
        # Entropies along one sequence depend on each other, so the error is that of the means of whole sequences.
        entropy = self._entropy(late).mean(0)  # [samples]
        return Estimate(entropy.mean(), entropy.std() / samples**0.5)

    def _entropy_rate_bounds(self, max_nodes: int) -> tuple[float, float]:
        """H(next | first state, L tokens) <= entropy rate <= H(next | L tokens), for the largest L that fits.

        Cover and Thomas, theorem 4.5.1.
        """
        pi = self.initial_state @ _limit(self.transition_matrices.sum(0))  # a mixture keeps its start's weights
        states = torch.eye(self.num_states).to(pi)
        # Both enumerate words: the upper bound from pi, the lower from every state with the weight that pi gives it.
        unknown = self._levels(200, max_nodes, pi[None])
        known = self._levels(200, max_nodes, states, pi)
        for (belief, weight), (belief_from_state, weight_from_state) in zip(unknown, known, strict=False):
            upper = float(weight @ self._entropy(belief))
            lower = float(weight_from_state @ self._entropy(belief_from_state))
            if upper - lower < 1e-12:
                break
        return lower, upper

    def _belief_chain(self, max_beliefs: int = 1_000):
        """The Markov chain of beliefs, (beliefs [N, S], transitions [N, N]), from the initial one; None if large."""
        beliefs = self.initial_state[None]  # all that were met; the row is the number
        begin = 0  # beliefs from this number on are not yet continued
        sources = []
        targets = []
        probs = []
        while begin < len(beliefs):
            known = len(beliefs)
            newest = beliefs[begin:]
            parent, _, child, prob = self.children(newest, torch.ones_like(newest[:, 0]))
            # The number of a child: that of the known belief with its key, else the next free one.
            keys, group = torch.unique(_keys(torch.cat([beliefs, child])), return_inverse=True)
            number = torch.full_like(keys, -1)
            number[group[:known]] = torch.arange(known, device=self.device)
            group = group[known:]
            unseen = torch.unique(group[number[group] < 0])
            number[unseen] = torch.arange(known, known + len(unseen), device=self.device)
            target = number[group]
            sources.append(parent + begin)
            targets.append(target)
            probs.append(prob)
            is_new = target >= known
            fresh = torch.empty(len(unseen), self.num_states).to(beliefs)
            fresh[target[is_new] - known] = child[is_new]
            beliefs = torch.cat([beliefs, fresh])
            begin = known
            if len(beliefs) > max_beliefs:
                return None
        # Tokens that lead from one belief to the same other add up.
        edges = (torch.cat(sources), torch.cat(targets))
        transitions = torch.zeros(len(beliefs), len(beliefs)).to(beliefs)
        transitions.index_put_(edges, torch.cat(probs), accumulate=True)
        return beliefs, transitions

    def mixed_state_tree(self, depth: int, min_prob: float = 0.0, order: str = "breadth") -> list[MixedState]:
        """Every word of up to `depth` tokens whose probability is at least min_prob (and not 0), with its belief.

        order: "breadth" lists short words first, "depth" lists each word directly before its continuations.
        """
        if order not in ("breadth", "depth"):
            raise ProcessError(f"order = {order!r}: use 'breadth' or 'depth'")
        words = [()]
        belief = self.initial_state[None]
        weight = torch.ones_like(belief[:, 0])
        nodes = list(map(MixedState, words, weight.tolist(), belief))
        for _ in range(depth):
            parent, token, belief, weight = self.children(belief, weight)
            keep = weight >= min_prob
            belief = belief[keep]
            weight = weight[keep]
            parents = parent[keep].tolist()
            tokens = token[keep].tolist()
            words = [(*words[p], x) for p, x in zip(parents, tokens, strict=True)]
            nodes += map(MixedState, words, weight.tolist(), belief)
        if order == "breadth":
            return nodes
        return sorted(nodes, key=lambda node: node.word)

    def _check_words(self, depth: int = 24, beam: int = 4_000) -> None:
        """Look for a word of negative weight: all short words, then the beam of those nearest to having one."""
        emit = (self.transition_matrices @ self.normalizing_eigenvector).t()  # [S, V]
        belief = self.initial_state[None]
        words = torch.empty(1, 0, dtype=torch.int64)
        for _ in range(depth):
            prob = belief @ emit  # [N, V]
            if prob.min() < -1e-9:
                n, token = divmod(int(prob.argmin()), self.vocab_size)
                raise ProcessError(
                    f"{self.name} is no process: after {words[n].tolist()} the token {token} has the "
                    f"negative weight {prob.min():.3g}"
                )
            parent, token, belief, _ = self.children(belief, torch.ones_like(belief[:, 0]))
            # One word of each belief goes on, and of these the ones with the least likely next token.
            _, member = _unique(belief)
            least = (belief[member] @ emit).min(1).values
            kept = member[least.argsort()[:beam]]
            belief = belief[kept]
            words = torch.cat([words[parent[kept]], token[kept, None]], 1)


def _keys(belief: torch.Tensor) -> torch.Tensor:
    """[N] int64 hashes of beliefs [N, S]; beliefs that agree to about 1e-10 have the same one.

    The sum of a random odd multiple of each state's weight, modulo 2^64: among a million beliefs, two that differ have
    the same one by chance with a probability of about 3e-8.
    """
    rounded = (belief * 1e10).round().long()
    factors = np.random.default_rng(0).integers(2**62, size=belief.shape[1]) * 2 + 1
    factors = torch.from_numpy(factors).to(belief.device)
    return (rounded * factors).sum(1)


def _unique(belief: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(group of each belief [N], one member of each group [G])."""
    _, group = torch.unique(_keys(belief), return_inverse=True)
    number = torch.arange(len(group), device=belief.device)
    member = torch.empty(int(group.max()) + 1, dtype=torch.int64, device=belief.device)
    member.scatter_(0, group, number)
    return group, member


def _merge(belief: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equal beliefs [N, S] become one, their weights [N] add up."""
    group, member = _unique(belief)
    total = torch.zeros_like(weight[: len(member)])
    total.index_add_(0, group, weight)
    return belief[member], total


def _limit(chain) -> torch.Tensor:
    """lim (I + P)^n / 2^n of a stochastic matrix P [N, N]: row i is where a chain from i is found in the long run."""
    P = torch.as_tensor(chain)
    identity = torch.eye(len(P)).to(P)
    P = (identity + P) / 2  # lazy, hence aperiodic: the limit exists and is P's time average
    for _ in range(60):  # squared 60 times: 10^18 steps
        P = P @ P
        P = P / P.sum(1, keepdim=True)  # rounding would grow with every square
    return P


def _reachable(P: np.ndarray) -> np.ndarray:
    """[N, N] bool: whether a chain P [N, N] comes from i to j, in any number of steps, none included."""
    reached = (P > 0) | np.eye(len(P), dtype=bool)
    for _ in range(len(P).bit_length()):  # paths of up to 2, 4, 8, ... steps
        reached = reached @ reached
    return reached


def _stationary(P: np.ndarray, recurrent: np.ndarray) -> np.ndarray:
    """Stationary state [N] of a stochastic matrix P [N, N] with one recurrent class, 0 outside of it.

    By elimination without subtraction (Grassmann, Taksar and Heyman 1985), which keeps the digits of rare states.
    """
    A = P[recurrent][:, recurrent]
    N = len(A)
    for k in range(N - 1, 0, -1):  # the chain as seen while not in states k, k + 1, ...
        A[:k, k] /= A[k, :k].sum()
        A[:k, :k] += np.outer(A[:k, k], A[k, :k])
    weight = np.ones(N)
    for k in range(1, N):
        weight[k] = weight[:k] @ A[:k, k]
    pi = np.zeros(len(P))
    pi[recurrent] = weight / weight.sum()
    return pi


def _normalize(T: np.ndarray, name: str, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale a stack to principal eigenvalue 1; return it with its right and left eigenvectors r and pi.

    Words of length L then have the total weight pi M^L r = pi r for every L, as probabilities must.

    Raises:
        ProcessError: if the eigenvalue of largest modulus is not real and positive, if there are several stationary
            states and no start, or if the stationary state has no weight.
    """
    M = T.sum(0)
    values, right = np.linalg.eig(M)
    real = np.where(np.abs(values.imag) < 1e-9, values.real, -np.inf)
    top = int(real.argmax())
    is_positive = real[top] > 1e-12
    is_exceeded = np.abs(values).max() > real[top] * (1 + 1e-7)
    if not is_positive or is_exceeded:
        raise ProcessError(
            f"{name} is no process: sum_x T[x] has the eigenvalues {np.round(values, 4).tolist()}; "
            "the one of largest modulus must be real and positive"
        )
    T = T / real[top]
    M = M / real[top]
    is_stochastic = (T >= 0).all() and np.allclose(M.sum(1), 1)
    if is_stochastic and np.abs(M.sum(1) - 1).max() < 1e-9:  # to more than the digits of a file
        recurrent = _reachable(M).all(0)
        if recurrent.any():  # one ergodic component, however rarely it changes between its parts
            return T, np.ones(len(M)), _stationary(M, recurrent)
    near_one = np.abs(values / real[top] - 1) < 1e-8
    if near_one.sum() > 1:  # several ergodic components
        if start is None or not is_stochastic:
            raise ProcessError(
                f"{name} has several stationary states: say where it starts with initial_state, "
                "or build it as process='nonergodic' from components"
            )
        # Where it starts decides which component it stays in, and so the stationary state.
        pi = start @ _limit(M).numpy()
        return T, np.ones(len(M)), pi / pi.sum()
    r = right[:, top].real
    left_values, left = np.linalg.eig(M.T)
    top_left = int(np.abs(left_values - 1).argmin())
    pi = left[:, top_left].real
    if abs(r.sum()) < 1e-12 or abs(pi.sum()) < 1e-12 or abs(pi @ r) < 1e-12:
        raise ProcessError(f"{name} is no process: its stationary state has no weight")
    r = r * len(r) / r.sum()
    pi = pi / pi.sum()
    if (T >= 0).all() and r.min() > 1e-9:
        # Seen by what futures weigh this is a chain too, whose rare states keep their digits.
        chain = M * r / r[:, None]
        recurrent = _reachable(chain).all(0)
        if recurrent.any():
            pi = _stationary(chain, recurrent) / r
            pi = pi / pi.sum()
    return T, r, pi


# ---------------------------------------------------------------------------------------------------------------
# Processes by name, mixtures, framing
# ---------------------------------------------------------------------------------------------------------------
def make_process(
    name: str = "mess3",
    *,
    initial_state=None,
    add_bos: bool = False,
    add_eos: bool = False,
    eos_prob: float = 0.05,
    **params,
) -> Process:
    """Build a process by name.

    name: one of PROCESSES with its parameters; "custom" with matrices=PATH (.npy, .npz) or a nested list [V, S, S];
        "nonergodic" with components=[{"process": NAME, "weight": 1, "vocab_map": [token, ...], ...params}, ...].
    initial_state: [S], where sequences start instead of the stationary state.
    add_eos: a token V that ends the sequence with probability eos_prob at every step, after which it starts anew.
    add_bos: a further token that begins each sequence. Both are part of the stack, so everything stays exact.
    Raises ProcessError, naming the allowed range or the known processes.
    """
    known = [*PROCESSES, *COMPOSED]
    if name not in known:
        hint = closest(name, known) or "."
        raise ProcessError(f"unknown process {name!r}{hint} Known: {', '.join(known)}")
    for key in params:
        if key not in parameters(name):
            takes = ", ".join(parameters(name)) or "none"
            owners = [process for process in known if key in parameters(process)]
            hint = f"; process={' or '.join(owners)} takes {key}" if owners else ""
            raise ProcessError(f"process {name} has no parameter {key!r}: it takes {takes}{hint}")
    try:
        if name == "nonergodic":
            process = _mixture(initial_state=initial_state, **params)
        elif name == "custom":
            process = _custom(_read_matrices(**params), initial_state, params.get("matrices"))
        else:
            process = Process(PROCESSES[name](**params), initial_state, name=name)
    except ProcessError:
        raise
    except Exception as error:  # a parameter of another type or far out of range, or a function that is not right yet
        if initial_state is not None:
            params["initial_state"] = initial_state
        raise ProcessError(f"process {name} cannot be built from {shown(params)}: {reason(error)}") from error
    if add_bos or add_eos:
        process = _framed(process, add_bos, eos_prob if add_eos else 0.0)
    return process


def shown(value) -> str:
    """A setting as messages show it: not all of long ones, nor of what is nested too deeply to be spelled."""
    try:
        text = repr(value)
    except RecursionError:
        return "what is nested too deeply"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _custom(matrices: np.ndarray, initial_state, source) -> Process:
    """The process of these matrices, with their fingerprint, and a note where they are not those of a chain.

    source: the file that they are of, by which the process is called, or they themselves.
    """
    is_file = isinstance(source, (str, Path))
    process = Process(matrices, initial_state, name=str(source) if is_file else "custom")
    if is_file:
        process.name = Path(source).name
    process.fingerprint = _digest(str(matrices.shape).encode() + matrices.tobytes())
    process.notes = _scaling(process, matrices)
    return process


def _scaling(process: Process, matrices: np.ndarray) -> list[str]:
    """What was done to matrices [V, S, S] whose probabilities did not add up to 1, a note; none where they did."""
    scale = float(np.abs(matrices).sum() / process.transition_matrices.abs().sum())
    M = matrices.sum(0)
    rows = M.sum(1)
    uneven = (matrices >= 0).all() and np.ptp(rows) > 1e-6 * rows.max()
    if uneven:
        hint = ""
        if np.allclose(M.sum(0), 1):
            hint = "; its columns do: if T[x][i, j] is a step from j to i there, transpose each matrix"
        divided = f", all divided by {scale:.6g}" if abs(scale - 1) > 1e-9 else " as they are"
        return [f"{process.name}: rows of the sum of its matrices add up to {rows.min():.4g} to {rows.max():.4g}, not "
                f"to 1{hint}. Taken for a generalised process{divided}"]
    if abs(scale - 1) > 1e-9:
        return [f"{process.name}: matrices divided by {scale:.12g}, the largest eigenvalue of their sum, so that "
                "probabilities add up to 1"]
    return []


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read_matrices(matrices=None) -> np.ndarray:
    """A stack [V, S, S] from a nested list or from an .npy or .npz file (the only array in it, or `matrices`)."""
    if matrices is None or (isinstance(matrices, str) and not matrices):
        raise ProcessError("process custom needs matrices: a nested list [V, S, S] or the path of an .npy or .npz file")
    is_file = isinstance(matrices, (str, Path))
    if is_file:
        regular_file(matrices, ProcessError)
    try:
        data = read_array(matrices, "matrices") if is_file else matrices
        if is_file and data.dtype.kind not in "iufb":
            raise ValueError(f"it holds {data.dtype}")
        return np.asarray(data, dtype=np.float64)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        if is_file and Path(matrices).suffix not in (".npy", ".npz"):
            raise ProcessError(
                f"{matrices} is no .npy or .npz file: write numbers of shape [V, S, S] with numpy.save"
            ) from error
        source = matrices if is_file else "the nested list"
        raise ProcessError(
            f"cannot read matrices from {source}: {error}; expected numbers of shape [V, S, S]"
        ) from error


class Component(NamedTuple):
    """A process of a mixture, what its tokens are called there, and its weight."""

    process: Process
    vocab_map: list
    weight: float


def _component(spec, where: str) -> Component:
    """Of {"process": NAME, "weight": 1, "vocab_map": [...], ...params}; where: how messages call it."""
    if not isinstance(spec, dict) or "process" not in spec:
        raise ProcessError(f"{where} = {shown(spec)}: expected {{'process': NAME, ...}}")
    params = dict(spec)
    name = params.pop("process")
    weight = params.pop("weight", 1.0)
    vocab_map = params.pop("vocab_map", None)
    process = make_process(name, **params)
    if vocab_map is None:
        vocab_map = range(process.vocab_size)
    vocab_map = list(vocab_map)
    are_tokens = all(isinstance(token, int) and token >= 0 for token in vocab_map)
    if len(set(vocab_map)) != process.vocab_size or not are_tokens:
        needed = counted(process.vocab_size, "distinct token")
        raise ProcessError(f"{where}: vocab_map = {vocab_map} needs {needed}")
    if not weight > 0:
        raise ProcessError(f"{where}: weight = {weight} must be positive")
    return Component(process, vocab_map, weight)


def _mixture(components: list | None = None, initial_state=None) -> Process:
    """A process that draws one of its components once and stays in it: block-diagonal, not ergodic."""
    if not components:
        raise ProcessError("process nonergodic needs components: a list of {'process': NAME, 'weight': 1, ...}")
    parts = [_component(spec, f"components[{i}]") for i, spec in enumerate(components)]
    S = sum(part.process.num_states for part in parts)
    V = 1 + max(max(part.vocab_map) for part in parts)
    total = sum(part.weight for part in parts)
    T = np.zeros((V, S, S))
    start = np.zeros(S)
    pi = np.zeros(S)
    r = np.zeros(S)
    begin = 0  # the first state of a component
    names = []
    for place, (process, vocab_map, weight) in enumerate(parts, 1):
        names += [f"{place} {process.name} {i}" for i in range(process.num_states)]
        block = slice(begin, begin + process.num_states)
        begin = block.stop
        share = weight / total
        eigenvector = process.normalizing_eigenvector
        stationary = process.stationary_state
        stationary = stationary / (stationary @ eigenvector)  # a component's weight is p . r, so this is scaled to 1
        T[vocab_map, block, block] = process.transition_matrices.numpy()
        r[block] = eigenvector.numpy()
        start[block] = share * process.initial_state.numpy()
        pi[block] = share * stationary.numpy()
    name = "nonergodic(" + " + ".join(part.process.name for part in parts) + ")"
    if initial_state is not None:
        start = initial_state
    mixture = Process(T, start, r, pi / pi.sum(), name)
    mixture.state_names = names
    prints = [part.process.fingerprint for part in parts]
    if any(prints):
        mixture.fingerprint = _digest(" ".join(prints).encode())
    for part in parts:
        new = [note for note in part.process.notes if note not in mixture.notes]
        mixture.notes += new
    return mixture


def _framed(process: Process, add_bos: bool, eos_prob: float) -> Process:
    """The process with tokens for the end (V, unless eos_prob is 0) and the beginning (the last one) of a sequence.

    EOS turns weight v T[x] into (1 - e) v T[x] and adds e (v . r) times the start, which leaves r the eigenvector.
    BOS is emitted from one more state, the last, where every sequence then starts.
    """
    _probabilities(eos_prob=eos_prob)
    V = process.vocab_size
    S = process.num_states
    r = process.normalizing_eigenvector.numpy()
    start = process.initial_state.numpy()
    pi = process.stationary_state.numpy()
    begin = start  # where a sequence begins, before its BOS if there is one
    tokens = V
    states = S
    if eos_prob > 0:
        tokens += 1
    if add_bos:
        tokens += 1
        states += 1
        begin = np.eye(states)[S]
        r = np.append(r, 1.0)
        pi = np.append(pi, 0.0)
    T = np.zeros((tokens, states, states))
    T[:V, :S, :S] = (1 - eos_prob) * process.transition_matrices.numpy()
    if add_bos:
        T[-1, S, :S] = start
    if eos_prob > 0:
        # T[EOS] r = e r, and the other tokens give (1 - e) r: their sum is r again.
        T[V, :S] = eos_prob * np.outer(r[:S], begin)
        # pi M = pi and pi . r = 1: least squares of a system with one equation more than unknowns, solved exactly.
        M = T.sum(0)
        identity = np.eye(states)
        equations = np.vstack([M.T - identity, r])
        right_side = np.eye(states + 1)[-1]
        pi = np.linalg.lstsq(equations, right_side, rcond=None)[0]
    framed = Process(T, begin, r, pi / pi.sum(), process.name)
    framed.fingerprint = process.fingerprint
    framed.notes = process.notes
    framed.state_names = [*process.state_names, "begin"][:states]
    return framed
