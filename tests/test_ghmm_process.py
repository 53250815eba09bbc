"""The processes of train_ghmm.py: samples, beliefs, probabilities and entropies against exhaustive enumeration."""
import inspect
import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from common.errors import InputError
from common.runtime import Runtime
from configurator import configure
from sources.processes import PROCESSES, Process, ProcessError, all_parameters, make_process, parameters
from sources.shared import counted
from train_ghmm import Batches, Config, build_process

GHMMS = ("tom_quantum", "fanizza", "post_quantum")
COINS = [{"process": "coin", "p": 0.3, "weight": 3, "vocab_map": [2, 0]}, {"process": "coin", "p": 0.6, "weight": 1}]
MIXTURE = {"name": "nonergodic", "components": [
    {"process": "mess3", "x": 0.1, "a": 0.7, "weight": 2},
    {"process": "sns", "p": 0.4, "q": 0.7, "vocab_map": [2, 1]},
    {"process": "fanizza", "alpha": 1.3, "lamb": 0.45, "weight": 0.5}]}
# Small and unlike one another: HMMs and GHMMs, unifilar and not, mixtures, framed, with a start of their own.
SPECS = {
    "coin": {"name": "coin", "p": 0.3},
    "sns": {"name": "sns", "p": 0.35, "q": 0.8},
    "mess3": {"name": "mess3", "x": 0.12, "a": 0.7},
    "rrxor": {"name": "rrxor", "p1": 0.3, "p2": 0.6},
    "leaky_rrxor": {"name": "leaky_rrxor", "epsilon": 0.2},
    "matching_parens": {"name": "matching_parens", "open_probs": [1, 0.7, 0.2]},
    "mr_name": {"name": "mr_name", "p": 0.2, "q": 0.5},
    "tom_quantum": {"name": "tom_quantum", "alpha": 1.0, "beta": 2.5},
    "fanizza": {"name": "fanizza", "alpha": 1.3, "lamb": 0.45},
    "post_quantum": {"name": "post_quantum", "log_alpha": 0.8, "beta": 0.3},
    "coins": {"name": "nonergodic", "components": COINS},
    "hmm_mixture": {"name": "nonergodic", "components": MIXTURE["components"][:2]},
    "ghmm_mixture": MIXTURE,
    "started": {"name": "mess3", "initial_state": [0.7, 0.3, 0.0]},
    "bos": {"name": "even_ones", "p": 0.4, "add_bos": True},
    "eos": {"name": "even_ones", "p": 0.4, "add_eos": True, "eos_prob": 0.3},
    "bos_eos": {"name": "mess3", "add_bos": True, "add_eos": True, "eos_prob": 0.2},
    "bos_eos_started": {"name": "sns", "add_bos": True, "add_eos": True, "eos_prob": 0.4, "initial_state": [0.1, 0.9]},
    "ghmm_bos_eos": {"name": "fanizza", "alpha": 1.3, "lamb": 0.45, "add_bos": True, "add_eos": True, "eos_prob": 0.25},
}
HMMS = [k for k, v in SPECS.items() if v["name"] not in GHMMS and k != "ghmm_mixture"]


@pytest.fixture(scope="module")
def processes():
    return {key: make_process(**spec) for key, spec in SPECS.items()}


@pytest.fixture(params=SPECS)
def process(request, processes):
    return processes[request.param]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words_of(process: Process, length: int) -> list[tuple]:
    return list(itertools.product(range(process.vocab_size), repeat=length))


def product(process: Process, word) -> np.ndarray:
    """v T[w1] ... T[wL], not normalized."""
    v, T = process.initial_state.numpy(), process.transition_matrices.numpy()
    for token in word:
        v = v @ T[token]
    return v


def weight(process: Process, word) -> float:
    return float(product(process, word) @ process.normalizing_eigenvector.numpy())


def weights_of(process: Process, length: int) -> np.ndarray:
    """Probabilities of all V^length words in lexicographic order, with no merging, pruning or rescaling."""
    rows = process.initial_state.numpy()[None]
    for _ in range(length):
        rows = np.einsum("ns,vsj->nvj", rows, process.transition_matrices.numpy()).reshape(-1, process.num_states)
    return rows @ process.normalizing_eigenvector.numpy()


def block_entropy(process: Process, length: int) -> float:
    p = weights_of(process, length)
    p = p[p > 1e-15]
    return float(-(p * np.log(p)).sum())


def binary_entropy(p: float) -> float:
    return -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)


def depth_for(process: Process, most: int) -> int:
    """The longest words of which there are at most `most`."""
    return int(math.log(most) / math.log(process.vocab_size) + 1e-9)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """p-value; cells expected fewer than 5 times are pooled, cells of probability 0 must be empty."""
    assert observed[expected < 1e-9 * expected.sum()].sum() == 0, "an impossible outcome was drawn"
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1]
        expected = expected * observed.sum() / expected.sum()
    return 1.0 if len(observed) < 2 else float(chisquare(observed, expected, sum_check=False).pvalue)


def word_numbers(tokens: torch.Tensor, V: int) -> np.ndarray:
    return (tokens.numpy() * V ** np.arange(tokens.shape[1])[::-1]).sum(1)


# Definitions -------------------------------------------------------------------------------------------------------

def literal(name: str, **p) -> np.ndarray:
    """The stacks as the field writes them, from scratch and for parameters that no symmetry hides."""
    if name == "coin":
        return np.array([[[p["p"]]], [[1 - p["p"]]]])
    if name == "even_ones":
        return np.array([[[1 - p["p"], 0], [0, 0]], [[0, p["p"]], [1, 0]]])
    if name == "no_consecutive_ones":
        return np.array([[[1 - p["p"], 0], [1, 0]], [[0, p["p"]], [0, 0]]])
    if name == "zero_one_random":
        return np.array([[[0, 1, 0], [0, 0, 0], [1 - p["p"], 0, 0]], [[0, 0, 0], [0, 0, 1], [p["p"], 0, 0]]])
    if name == "sns":
        return np.array([[[1 - p["p"], p["p"]], [0, 1 - p["q"]]], [[0, 0], [p["q"], 0]]])
    if name == "mess3":
        y, b = 1 - 2 * p["x"], (1 - p["a"]) / 2
        return np.array([[[(y if i == j else p["x"]) * (p["a"] if j == k else b) for j in range(3)] for i in range(3)]
                         for k in range(3)])
    if name in ("rrxor", "leaky_rrxor"):
        T, s = np.zeros((2, 5, 5)), dict(S=0, zero=1, one=2, T=3, F=4)
        for source, target, token, prob in (
                ("S", "zero", 0, p["p1"]), ("S", "one", 1, 1 - p["p1"]), ("zero", "F", 0, p["p2"]),
                ("zero", "T", 1, 1 - p["p2"]), ("one", "T", 0, p["p2"]), ("one", "F", 1, 1 - p["p2"]),
                ("T", "S", 1, 1), ("F", "S", 0, 1)):
            T[token, s[source], s[target]] = prob
        e = p.get("epsilon", 0)
        return (1 - e) * T + e / 10
    if name == "mr_name":
        s = 1 - p["p"] - p["q"]
        rows = {0: {3: 1}, 1: {0: p["q"], 1: s, 2: p["p"]}, 2: {0: p["q"], 1: p["p"], 2: s}, 3: {1: 0.5, 2: 0.5}}
        T = np.zeros((4, 4, 4))
        for i, row in rows.items():
            for j, prob in row.items():
                T[j, i, j] = prob
        return T
    if name == "tom_quantum":
        a, b = p["alpha"], p["beta"]
        n = 4 * (a * a + b * b)
        m, o = (a * a - b * b) / n, 2 * a * b / n
        near = [[[0.25, 0, z], [0, m, 0], [z, 0, 0.25]] for z in (o, -o)]
        far = [[[0.25, z, 0], [z, 0.25, 0], [0, 0, m]] for z in (o, -o)]
        return np.array(near + far)
    if name == "fanizza":
        c, s, lamb = math.cos(p["alpha"]), math.sin(p["alpha"]), p["lamb"]
        A = (1 - lamb * c + lamb * s) / (1 - 2 * lamb * c + lamb**2)
        B = (1 - lamb * c - lamb * s) / (1 - 2 * lamb * c + lamb**2)
        start = [1 - (2 / (1 - lamb) - A - B) / 4, 1 / (2 * (1 - lamb)), -A / 4, -B / 4]
        w = [1, 1 - lamb, 1 + lamb * (s - c), 1 - lamb * (s + c)]
        T0 = [[wi * pj for pj in start] for wi in w]
        return np.array([T0, [[0, 0, 0, 0], [0, lamb, 0, 0], [0, 0, lamb * c, -lamb * s], [0, 0, lamb * s, lamb * c]]])
    if name == "post_quantum":
        T = [[[1, -1, -1], [1, -1, -1], [0, 0, 0]]]
        T += [[[v, 0, 0], [0, 1, 0], [0, math.log(v), 1]] for v in (math.exp(p["log_alpha"]), p["beta"])]
        return np.array(T) / np.linalg.eigvals(np.sum(T, 0)).real.max()
    raise KeyError(name)


@pytest.mark.parametrize("name, params", [
    ("coin", {"p": 0.2}), ("even_ones", {"p": 0.3}), ("no_consecutive_ones", {"p": 0.3}), ("sns", {"p": 0.2, "q": 0.7}),
    ("zero_one_random", {"p": 0.3}), ("mess3", {"x": 0.1, "a": 0.5}), ("rrxor", {"p1": 0.2, "p2": 0.9}),
    ("leaky_rrxor", {"p1": 0.2, "p2": 0.9, "epsilon": 0.3}), ("mr_name", {"p": 0.1, "q": 0.7}),
    ("fanizza", {"alpha": 1.3, "lamb": 0.4}),
    ("post_quantum", {"log_alpha": 0.8, "beta": 0.3})])
def test_stack_is_the_published_one_at_asymmetric_parameters(name, params):
    stack = make_process(name, **params).transition_matrices
    np.testing.assert_allclose(stack, literal(name, **params), rtol=0, atol=1e-12)


def test_tom_quantum_stack_is_the_published_one_at_asymmetric_parameters(processes):
    found = processes["tom_quantum"].transition_matrices
    np.testing.assert_allclose(found, literal("tom_quantum", alpha=1.0, beta=2.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_default_process_satisfies_its_eigen_equations(name):
    process = make_process(name)
    T, r, pi = (x.numpy() for x in (process.transition_matrices, process.normalizing_eigenvector,
                                    process.stationary_state))
    V, S = process.vocab_size, process.num_states
    assert T.shape == (V, S, S) and T.dtype == r.dtype == pi.dtype == np.float64
    np.testing.assert_allclose(T.sum(0) @ r, r, atol=1e-12)
    np.testing.assert_allclose(pi @ T.sum(0), pi, atol=1e-12)
    assert r.sum() == pytest.approx(S) and pi.sum() == pytest.approx(1)
    assert process.initial_state.numpy() @ r == pytest.approx(1)
    assert process.is_hmm == (name not in GHMMS)
    if process.is_hmm:
        assert (T >= 0).all() and (pi >= 0).all()
        np.testing.assert_allclose(T.sum((0, 2)), 1, atol=1e-12)
    assert weights_of(process, 3).min() > -1e-12


@pytest.mark.parametrize("key", SPECS)
def test_every_variant_satisfies_its_eigen_equations(key, processes):
    process = processes[key]
    M = process.transition_matrices.sum(0)
    torch.testing.assert_close(M @ process.normalizing_eigenvector, process.normalizing_eigenvector)
    torch.testing.assert_close(process.stationary_state @ M, process.stationary_state)
    assert float(process.stationary_state.sum()) == pytest.approx(1)


def test_days_of_week_says_what_a_calendar_says():
    T = make_process("days_of_week").transition_matrices.numpy()
    M, Tu, W, Th, F, Sa, Su, Tmrw, Yest, Wknd, Wkdy = range(11)
    total = 6 + 5 + 1 + 1 + 1 + 1  # six days by name, tomorrow's name, Tmrw, Yest, Wkdy in all, Wknd in all
    assert T[Sa, F, Sa] == pytest.approx(5 / total) and T[M, Su, M] == pytest.approx(5 / total)
    assert T[F, F, F] == pytest.approx(1 / total) and T[Sa, F, F] == 0
    assert T[Tmrw, Su, M] == pytest.approx(1 / total) and T[Yest, M, Su] == pytest.approx(1 / total)
    assert T[Tmrw, W, Th] == pytest.approx(1 / total) and T[Yest, W, Tu] == pytest.approx(1 / total)
    np.testing.assert_allclose(T[Wknd, Th], np.array([0, 0, 0, 0, 0, 0.5, 0.5]) / total)
    np.testing.assert_allclose(T[Wkdy, Th], np.array([0.2, 0.2, 0.2, 0.2, 0.2, 0, 0]) / total)
    assert (T[[Tmrw, Yest]] > 0).sum() == 14


def test_matching_parens_never_closes_what_is_not_open():
    process = make_process("matching_parens", open_probs=[1.0, 0.7, 0.2])
    assert process.num_states == 4
    np.testing.assert_allclose(process.transition_matrices[0], np.diag([1, 0.7, 0.2], 1))
    np.testing.assert_allclose(process.transition_matrices[1], np.diag([0.3, 0.8, 1], -1))
    closed = make_process("matching_parens", open_probs=[1.0, 0.7, 0.2, 0.0])
    torch.testing.assert_close(closed.transition_matrices, process.transition_matrices)
    empty = make_process("matching_parens", open_probs=[1.0, 0.7, 0.2], initial_state=[1, 0, 0, 0])
    assert empty.word_probability([1]) == 0 and empty.word_probability([0, 0, 0, 0]) == 0
    assert empty.word_probability([0, 0, 1, 1]) == pytest.approx(0.7 * 0.8 * 0.3)
    assert empty.word_probability([0, 1, 1]) == 0


# Sampling ----------------------------------------------------------------------------------------------------------

def test_sampled_words_are_as_frequent_as_their_probabilities(process):
    length, count = min(5, depth_for(process, 300)), 30_000
    tokens = process.sample(count, length, seeded(1))
    assert tokens.shape == (count, length) and tokens.dtype == torch.int64
    observed = np.bincount(word_numbers(tokens, process.vocab_size), minlength=process.vocab_size**length)
    assert chi_square(observed, count * weights_of(process, length).clip(0)) > 1e-4


@pytest.mark.parametrize("key", ["sns", "mess3", "tom_quantum", "fanizza", "post_quantum", "ghmm_mixture", "coins"])
def test_sampled_words_are_as_frequent_late_as_early(key, processes):
    """Stationary starts: the last words of long sequences follow the same law; catches belief drift and lost scale."""
    process, count, length = processes[key], 8_000, 3
    tokens = process.sample(count, 40, seeded(2))[:, -length:]
    observed = np.bincount(word_numbers(tokens, process.vocab_size), minlength=process.vocab_size**length)
    assert chi_square(observed, count * weights_of(process, length).clip(0)) > 1e-4


@pytest.mark.parametrize("key", HMMS)
def test_hidden_path_fits_the_tokens_and_the_matrices(key, processes):
    process, count, length = processes[key], 5_000, 6
    tokens, path = process.sample(count, length, seeded(3), return_states=True)
    assert path.shape == (count, length + 1)
    T, S, V = process.transition_matrices.numpy(), process.num_states, process.vocab_size
    source, target, token = path[:, :-1].flatten().numpy(), path[:, 1:].flatten().numpy(), tokens.flatten().numpy()
    assert (T[token, source, target] > 0).all()
    start = np.bincount(path[:, 0].numpy(), minlength=S)
    assert chi_square(start, count * process.initial_state.numpy()) > 1e-4
    for state in range(S):
        here = source == state
        observed = np.bincount(token[here] * S + target[here], minlength=V * S)
        if here.any():
            assert chi_square(observed, here.sum() * T[:, state].reshape(-1)) > 1e-5


def test_sampling_is_a_function_of_the_generator_alone(process):
    first, again = process.sample(8, 5, seeded(5)), process.sample(8, 5, seeded(5))
    assert torch.equal(first, again)
    assert not torch.equal(process.sample(64, 12, seeded(5)), process.sample(64, 12, seeded(6)))


@pytest.mark.parametrize("key", GHMMS)
def test_no_hidden_path_is_invented_for_a_ghmm(key, processes):
    with pytest.raises(ProcessError, match="no hidden path"):
        processes[key].sample(2, 3, return_states=True)


def test_generate_in_two_halves_equals_one_long_call(process):
    uniforms = torch.rand(32, 50, generator=seeded(7), dtype=torch.float64)
    tokens, end = process.generate(uniforms)
    left, state = process.generate(uniforms[:13])
    # The first row of the second call is not read: the state goes on from the first.
    unread = torch.full((1, 50), 0.999, dtype=torch.float64)
    right, last = process.generate(torch.cat([unread, uniforms[13:]]), state)
    assert torch.equal(torch.cat([left, right], 1), tokens)
    torch.testing.assert_close(last, end, rtol=1e-9, atol=1e-9)
    if process.is_hmm:
        path = process.generate(uniforms, whole_path=True)[1]
        assert torch.equal(path[:, -1], end) and torch.equal(path[:, 12], state)
        assert torch.equal(process.generate(uniforms, whole_path=True)[0], tokens)
    else:
        torch.testing.assert_close(end, process.beliefs(tokens)[:, -1], rtol=1e-9, atol=1e-9)


def test_a_row_of_tokens_depends_on_its_own_uniforms_only(process):
    uniforms = torch.rand(9, 40, generator=seeded(8), dtype=torch.float64)
    tokens, _ = process.generate(uniforms)
    other = uniforms.clone()
    other[:, 20:] = torch.rand(9, 20, generator=seeded(9), dtype=torch.float64)
    assert torch.equal(process.generate(other)[0][:20], tokens[:20])
    assert not torch.equal(process.generate(other)[0][20:], tokens[20:])
    assert torch.equal(process.generate(uniforms[:, 3:5].contiguous())[0], tokens[3:5])


def test_a_token_depends_on_uniforms_before_it_only(process):
    uniforms = torch.rand(9, 40, generator=seeded(8), dtype=torch.float64)
    tokens, _ = process.generate(uniforms)
    assert torch.equal(process.generate(uniforms[:6])[0], tokens[:, :5])


def test_extreme_uniforms_give_possible_words(process):
    """0 and the largest float64 below 1 are what torch.rand may return: no impossible token, no index out of range."""
    low = 0.0 if process.is_hmm else 1e-12  # a GHMM's zeros are differences, exact to rounding only
    uniforms = torch.tensor(list(itertools.product([low, 1 - 2.0**-53], repeat=7)), dtype=torch.float64).t()
    tokens, _ = process.generate(uniforms.contiguous())
    assert torch.isfinite(process.log_prob(tokens)).all()


# Beliefs and probabilities -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", HMMS)
def test_beliefs_equal_brute_force_over_all_hidden_paths(key, processes):
    process = processes[key]
    T, start, S = process.transition_matrices.numpy(), process.initial_state.numpy(), process.num_states
    length = 3 if S > 4 else 4
    tokens = process.sample(4, length, seeded(11))
    found = process.beliefs(tokens)
    assert found.shape == (4, length + 1, S) and found.dtype == torch.float64
    for b, word in enumerate(tokens.tolist()):
        for t in range(length + 1):
            joint = np.zeros(S)  # p(the first t tokens, the state after them)
            for path in itertools.product(range(S), repeat=t + 1):
                joint[path[-1]] += start[path[0]] * math.prod(T[word[k], path[k], path[k + 1]] for k in range(t))
            np.testing.assert_allclose(found[b, t], joint / joint.sum(), atol=1e-12)
            assert process.word_probability(word[:t]) == pytest.approx(joint.sum(), rel=1e-10)


def test_beliefs_equal_direct_matrix_products(process):
    tokens = process.sample(6, 37, seeded(12))  # longer than two stretches between rescalings
    found, r = process.beliefs(tokens), process.normalizing_eigenvector.numpy()
    for b, word in enumerate(tokens.tolist()):
        for t in (0, 1, 15, 16, 17, 31, 32, 33, 37):
            v = product(process, word[:t])
            np.testing.assert_allclose(found[b, t], v / (v @ r), rtol=1e-8, atol=1e-10, err_msg=f"{b}, {t}")
    torch.testing.assert_close(found @ process.normalizing_eigenvector, torch.ones(6, 38).double())


def test_log_probs_are_conditional_and_sum_to_the_word_probability(process):
    tokens = process.sample(5, 20, seeded(13))
    log_prob = process.log_prob(tokens)
    assert log_prob.shape == (5, 20)
    for word, row in zip(tokens.tolist(), log_prob, strict=True):
        assert math.exp(row.sum()) == pytest.approx(weight(process, word), rel=1e-9)
        assert process.word_probability(word) == pytest.approx(weight(process, word), rel=1e-9)
        assert float(row[7]) == pytest.approx(math.log(weight(process, word[:8]) / weight(process, word[:7])), abs=1e-9)


def test_probabilities_of_all_words_sum_to_one(process):
    words = words_of(process, depth_for(process, 700))
    found = process.log_prob(words).sum(1).exp()
    assert float(found.sum()) == pytest.approx(1, abs=1e-10)
    np.testing.assert_allclose(found, weights_of(process, len(words[0])), atol=1e-13)
    assert process.word_probability([]) == pytest.approx(1, abs=1e-12)


def test_next_token_probs_are_ratios_of_word_probabilities(process):
    tokens = process.sample(4, 5, seeded(14))
    found = process.next_token_probs(process.beliefs(tokens))
    assert found.shape == (4, 6, process.vocab_size)
    for word, row in zip(tokens.tolist(), found[:, 5], strict=True):
        expected = [weight(process, [*word, x]) / weight(process, word) for x in range(process.vocab_size)]
        np.testing.assert_allclose(row, expected, atol=1e-10)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 6).double())


def test_twenty_thousand_tokens_have_the_log_prob_of_a_forward_pass_in_log_space():
    process = make_process("mess3", x=0.05, a=0.85)
    tokens = process.sample(1, 20_000, seeded(15))
    found = process.log_prob(tokens)[0].numpy()
    assert np.isfinite(found).all()
    log_T = np.log(process.transition_matrices.numpy())
    alpha, total = np.log(process.initial_state.numpy()), 0.0
    running = np.empty(20_000)
    for t, token in enumerate(tokens[0].tolist()):
        alpha = np.logaddexp.reduce(alpha[:, None] + log_T[token], axis=0)
        running[t] = alpha.max() + math.log(np.exp(alpha - alpha.max()).sum())
    assert running[-1] < -10_000  # far below what float64 holds as a probability
    np.testing.assert_allclose(found, np.diff(running, prepend=total), atol=1e-9)


@pytest.mark.parametrize("key", [*GHMMS, "ghmm_mixture"])
def test_long_log_prob_of_a_ghmm_equals_step_by_step_normalization(key, processes):
    process = processes[key]
    tokens = process.sample(1, 3_000, seeded(16))
    T, r = process.transition_matrices.numpy(), process.normalizing_eigenvector.numpy()
    v = process.initial_state.numpy()
    expected = []
    for token in tokens[0].tolist():
        v = v @ T[token]
        expected.append(math.log(v @ r))
        v = v / (v @ r)
    np.testing.assert_allclose(process.log_prob(tokens)[0], expected, atol=1e-7)


@pytest.mark.parametrize("at", [1, 5, 15, 16, 17, 40])
def test_an_impossible_word_has_log_prob_minus_infinity_from_its_first_impossible_token_on(at):
    process = make_process("no_consecutive_ones", p=0.4)
    tokens = torch.zeros(3, 50, dtype=torch.int64)
    tokens[1, at - 1 : at + 1] = 1
    found = process.log_prob(tokens)
    assert torch.isinf(found[1, at:]).all() and (found[1, at:] < 0).all()
    assert torch.isfinite(found[1, :at]).all() and torch.isfinite(found[[0, 2]]).all()
    torch.testing.assert_close(found[0], process.log_prob(tokens[:1])[0])
    assert process.word_probability(tokens[1]) == 0
    with pytest.raises(ProcessError, match=rf"token 1 at position {at} of sequence 1 is impossible"):
        process.beliefs(tokens)


def test_empty_words_have_the_initial_belief(process):
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert process.log_prob(empty).shape == (2, 0)
    torch.testing.assert_close(process.beliefs(empty), process.initial_state.expand(2, 1, -1))


@pytest.mark.parametrize("tokens, message", [
    ([[0, 3]], r"0\.\.2; got 0\.\.3"), ([[-1, 0]], r"0\.\.2; got -1\.\.0"), ([0, 1], r"expected \[B, L\]")])
def test_tokens_outside_the_vocabulary_are_refused(tokens, message):
    with pytest.raises(ProcessError, match=message):
        make_process("mess3").beliefs(tokens)


# Entropies ---------------------------------------------------------------------------------------------------------

def test_myopic_entropy_equals_enumeration_of_all_words_without_merging(process):
    depth = depth_for(process, 20_000)
    blocks = [block_entropy(process, n) for n in range(depth + 1)]
    found = process.entropies(depth - 1)
    np.testing.assert_allclose(found, np.diff(blocks), atol=1e-9)
    assert all(e.error == 0 for e in found)
    assert float(process.myopic_entropy(depth - 1)) == pytest.approx(found[-1], abs=1e-12)


def test_optimal_loss_is_the_entropy_after_one_two_and_more_tokens():
    process = make_process("mess3")
    expected = [block_entropy(process, n + 1) - block_entropy(process, n) for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(process.optimal_loss(4), expected, atol=1e-10)


def test_optimal_loss_after_bos_alone_is_the_entropy_of_a_first_token():
    plain, framed = make_process("mess3"), make_process("mess3", add_bos=True)
    np.testing.assert_allclose(framed.optimal_loss(5), plain.entropies(4), atol=1e-10)
    assert float(framed.myopic_entropy(0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name, rate, tolerance", [("rrxor", 2 / 3 * math.log(2), 1e-6),
                                                   ("even_ones", 2 / 3 * math.log(2), 1e-8)])
def test_merging_reaches_sixty_tokens_in_few_nodes_and_there_the_entropy_rate(name, rate, tolerance):
    """2^60 words: without merging equal beliefs this neither ends nor fits into 200 nodes."""
    found = make_process(name).entropies(60, max_nodes=200)
    assert len(found) == 61 and all(e.error == 0 for e in found)
    assert float(found[60]) == pytest.approx(rate, abs=tolerance)
    assert all(b <= a + 1e-10 for a, b in itertools.pairwise(found))  # conditioning on more never hurts


@pytest.mark.parametrize("key, nodes", [
    ("mess3", 30), ("leaky_rrxor", 30), ("tom_quantum", 30), ("coins", 7), ("eos", 5)])
def test_monte_carlo_beyond_the_node_budget_is_within_five_standard_errors(key, nodes, processes):
    process = processes[key]
    exact, found = process.entropies(7), process.entropies(7, max_nodes=nodes, samples=4_000, seed=3)
    assert len(found) == 8 and all(e.error == 0 for e in exact)
    estimated = [(e, f) for e, f in zip(exact, found, strict=True) if f.error > 0]
    assert len(estimated) >= 2
    for e, f in zip(exact, found, strict=True):
        assert abs(e - f) <= 5 * f.error + 1e-9
        assert f.error < 0.02


def test_monte_carlo_errors_are_the_spread_over_seeds():
    """An error that is too small by sqrt(samples), or not a standard error at all, shows against repetition."""
    process = make_process("mess3")
    runs = [process.entropies(4, max_nodes=1, samples=200, seed=s)[4] for s in range(40)]
    assert np.mean([r.error for r in runs]) == pytest.approx(np.std(runs, ddof=1), rel=0.35)


def closed_forms() -> dict:
    h = binary_entropy
    s, p, q = 0.3, 0.2, 0.5  # mr_name: Mr. -> name -> the two others
    chain = np.array([[0, 0, 0, 1], [q, s, p, 0], [q, p, s, 0], [0, 0.5, 0.5, 0]])
    pi = np.linalg.matrix_power((chain + np.eye(4)) / 2, 2_000)[0]
    mr_name = -sum(pi[i] * x * math.log(x) for i in range(4) for x in chain[i] if x > 0)
    depth = np.array([0.3, 1, 0.7 * 1 / 0.8, 0.7 * 0.2 / 0.8])  # detailed balance: pi_d open_d = pi_{d+1} close_{d+1}
    depth /= depth.sum()
    default_depth = np.array([0.5, 1, 0.5 / 0.6, 0.5 * 0.4 / 0.6])
    default_depth /= default_depth.sum()
    return {
        "coin": ({"name": "coin", "p": 0.3}, h(0.3)),
        "golden_mean": ({"name": "no_consecutive_ones", "p": 0.3}, h(0.3) / 1.3),
        "even": ({"name": "even_ones", "p": 0.3}, h(0.3) / 1.3),
        "zero_one_random": ({"name": "zero_one_random", "p": 0.3}, h(0.3) / 3),
        "rrxor": ({"name": "rrxor", "p1": 0.3, "p2": 0.6}, (h(0.3) + h(0.6)) / 3),
        "mr_name": ({"name": "mr_name", "p": 0.2, "q": 0.5}, mr_name),
        "matching_parens": ({"name": "matching_parens", "open_probs": [1, 0.7, 0.2]},
                            depth[1] * h(0.7) + depth[2] * h(0.2)),
        "default_matching_parens": ({"name": "matching_parens"}, default_depth[1:3] @ [h(0.5), h(0.4)]),
        "deterministic": ({"name": "coin", "p": 1.0}, 0.0),
        "mixture_of_coins": ({"name": "nonergodic", "components": [
            {"process": "coin", "p": 0.1, "weight": 3}, {"process": "coin", "p": 0.6}]}, 0.75 * h(0.1) + 0.25 * h(0.6)),
        "told_apart_mixture": ({"name": "nonergodic", "components": [
            {"process": "coin", "p": 0.1, "weight": 3}, {"process": "even_ones", "p": 0.3, "vocab_map": [2, 3]}]},
            0.75 * h(0.1) + 0.25 * h(0.3) / 1.3),
        "bos": ({"name": "no_consecutive_ones", "p": 0.3, "add_bos": True}, h(0.3) / 1.3),
        "eos_coin": ({"name": "coin", "p": 0.3, "add_eos": True, "eos_prob": 0.2}, h(0.2) + 0.8 * h(0.3)),
    }


@pytest.mark.parametrize("key", closed_forms())
def test_entropy_rate_equals_its_closed_form(key):
    spec, expected = closed_forms()[key]
    found = make_process(**spec).entropy_rate()
    assert 0 <= found.error < 1e-9
    assert abs(found - expected) <= found.error + 1e-9


@pytest.mark.parametrize("p, q", [(0.5, 0.5), (0.4, 0.7)])
def test_entropy_rate_of_sns_equals_that_of_its_renewal_process(p, q):
    """Every 1 resets sns, so its rate is the entropy of the gap between ones over the mean gap."""
    survive, gaps = np.array([1.0, 0.0]), []
    for _ in range(400):
        gaps.append(survive[1] * q)
        survive = survive @ np.array([[1 - p, p], [0, 1 - q]])
    gaps = np.array(gaps)
    lengths = np.arange(1, 401)
    expected = -(gaps[gaps > 0] * np.log(gaps[gaps > 0])).sum() / (gaps @ lengths)
    found = make_process("sns", p=p, q=q).entropy_rate()
    assert 0 <= found.error < 1e-9
    assert float(found) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("x, a", [(0.05, 0.85), (0.15, 0.6)])
def test_entropy_rate_of_mess3_lies_in_its_bracket_and_a_larger_budget_narrows_it(x, a):
    process = make_process("mess3", x=x, a=a)
    coarse, fine = process.entropy_rate(max_nodes=2_000), process.entropy_rate(max_nodes=40_000)
    assert 0 < fine.error < coarse.error < 1e-3
    assert coarse - coarse.error <= fine - fine.error and fine + fine.error <= coarse + coarse.error
    assert fine - fine.error <= process.myopic_entropy(9)
    started = [make_process("mess3", x=x, a=a, initial_state=s).myopic_entropy(5) for s in np.eye(3)]
    assert np.mean(started) <= fine + fine.error


def test_entropy_rate_by_monte_carlo_is_within_five_standard_errors(processes):
    """mess3 with a budget too small for its bracket, and a GHMM, which has none."""
    exact = make_process("mess3").entropy_rate()
    rough = make_process("mess3").entropy_rate(max_nodes=30, samples=500, length=200)
    assert rough.error > 1e-6 and abs(rough - exact) <= 5 * rough.error
    process = processes["tom_quantum"]
    found = process.entropy_rate(samples=500, length=200)
    surprise = -process.log_prob(process.sample(500, 200, seeded(1)))[:, 100:].mean(1)
    assert found.error > 0
    assert abs(found - surprise.mean()) <= 5 * math.hypot(found.error, surprise.std() / 500**0.5)
    assert found <= process.myopic_entropy(4) + 5 * found.error


def test_entropy_rate_of_a_mixture_follows_its_own_initial_state():
    """Nine in ten sequences start in the first coin, whatever the weights of the components say."""
    components = [{"process": "coin", "p": 0.1}, {"process": "coin", "p": 0.6}]
    found = make_process("nonergodic", components=components, initial_state=[0.9, 0.1]).entropy_rate()
    expected = 0.9 * binary_entropy(0.1) + 0.1 * binary_entropy(0.6)
    assert abs(found - expected) <= 5 * found.error + 1e-9


# Mixed-state tree --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", ["mess3", "rrxor", "fanizza", "coins", "bos_eos"])
def test_mixed_state_tree_holds_every_possible_word_once_with_its_probability_and_belief(key, processes):
    process, depth = processes[key], 3
    nodes = process.mixed_state_tree(depth)
    expected = {w: weight(process, w) for n in range(depth + 1) for w in words_of(process, n)}
    expected = {w: p for w, p in expected.items() if p > 1e-13}
    assert len(nodes) == len(expected) and {n.word for n in nodes} == set(expected)
    for node in nodes:
        assert node.probability == pytest.approx(expected[node.word], rel=1e-9)
        v = product(process, node.word)
        np.testing.assert_allclose(node.belief, v / (v @ process.normalizing_eigenvector.numpy()), atol=1e-10)


def test_mixed_state_tree_lists_breadth_first_or_depth_first():
    process = make_process("no_consecutive_ones")
    breadth = [n.word for n in process.mixed_state_tree(3)]
    assert breadth == sorted(breadth, key=lambda w: (len(w), w))
    assert [sum(len(w) == n for w in breadth) for n in range(4)] == [1, 2, 3, 5]  # Fibonacci
    depth = [n.word for n in process.mixed_state_tree(2, order="depth")]
    assert depth == [(), (0,), (0, 0), (0, 1), (1,), (1, 0)]
    full = process.mixed_state_tree(3, order="depth")
    other = {n.word: n.probability for n in process.mixed_state_tree(3)}
    assert {n.word: n.probability for n in full} == pytest.approx(other, abs=1e-12)
    with pytest.raises(ProcessError, match="'breadth' or 'depth'"):
        process.mixed_state_tree(2, order="random")


def test_mixed_state_tree_leaves_out_words_less_probable_than_min_prob():
    process = make_process("coin", p=0.25)
    words = {n.word for n in process.mixed_state_tree(3, min_prob=0.1)}
    assert words == {w for n in range(4) for w in words_of(process, n) if weight(process, w) >= 0.1}
    assert {len(w) for w in words} == {0, 1, 2, 3} and (0, 0) not in words
    assert (0,) in {n.word for n in process.mixed_state_tree(2, min_prob=0.25)}  # "at least" includes equality


# Parameters and files ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, params, message", [
    ("coin", {"p": 1.5}, r"p = 1\.5.*\[0, 1\]"), ("coin", {"p": -0.1}, r"\[0, 1\]"),
    ("coin", {"p": math.nan}, r"\[0, 1\]"),
    ("even_ones", {"p": 2}, r"\[0, 1\]"), ("no_consecutive_ones", {"p": -1}, r"\[0, 1\]"),
    ("zero_one_random", {"p": 1.01}, r"\[0, 1\]"), ("sns", {"q": 1.2}, r"q = 1\.2.*\[0, 1\]"),
    ("mess3", {"x": 0.6}, r"x = 0\.6.*\[0, 0\.5\]"), ("mess3", {"a": 1.1}, r"a = 1\.1.*\[0, 1\]"),
    ("rrxor", {"p2": 7}, r"p2 = 7.*\[0, 1\]"), ("leaky_rrxor", {"epsilon": -0.1}, r"epsilon.*\[0, 1\]"),
    ("matching_parens", {"open_probs": [0.5, 0.5]}, "must start with 1"),
    ("matching_parens", {"open_probs": [1, 1.5, 0.2]}, r"open_probs\[1\] = 1\.5.*\[0, 1\]"),
    ("mr_name", {"p": 0.7, "q": 0.6}, r"1 - p - q.*\[0, 1\]"), ("tom_quantum", {"alpha": 0, "beta": 0}, "both 0"),
    ("fanizza", {"lamb": 1.0}, r"\(0, 1\)"), ("fanizza", {"lamb": 0.0}, r"\(0, 1\)"),
    ("post_quantum", {"log_alpha": -1}, "log_alpha > 0"), ("post_quantum", {"beta": 1.0}, "0 < beta < 1"),
    ("post_quantum", {"log_alpha": math.log(4), "beta": 0.5}, "no integer"),
    ("post_quantum", {"log_alpha": math.log(1.7), "beta": 0.3}, "!= 2"),
    ("coin", {"add_eos": True, "eos_prob": 1.5}, r"eos_prob = 1\.5.*\[0, 1\]"),
    ("coin", {"initial_state": [1, 0]}, "initial_state must be 1 number, "),
    ("mess3", {"initial_state": [0, 0, 0]}, "positive weight"),
    ("mess3", {"initial_state": [1.5, -0.5, 0]}, "negative probability"),
    ("nonergodic", {}, "needs components"), ("nonergodic", {"components": []}, "needs components"),
    ("nonergodic", {"components": ["coin"]}, r"components\[0\]"),
    ("nonergodic", {"components": [{"process": "coin", "weight": 0}]}, r"weight = 0 must be positive"),
    ("nonergodic", {"components": [{"process": "coin", "vocab_map": [1, 1]}]}, "2 distinct tokens"),
    ("nonergodic", {"components": [{"process": "coin", "vocab_map": [1]}]}, "2 distinct tokens"),
    ("nonergodic", {"components": [{"process": "coin", "vocab_map": [-1, 1]}]}, "2 distinct tokens"),
    ("nonergodic", {"components": [{"process": "coin", "p": 3}]}, r"\[0, 1\]"),
    ("nonergodic", {"components": [{"process": "cion"}]}, "did you mean 'coin'"),
])
def test_a_wrong_parameter_is_refused_with_what_is_allowed(name, params, message):
    with pytest.raises(ProcessError, match=message):
        make_process(name, **params)


@pytest.mark.parametrize("name, params", [
    ("coin", {"p": "half"}), ("coin", {"p": None}), ("mess3", {"x": [0.1]}), ("matching_parens", {"open_probs": 0.5}),
    ("matching_parens", {"open_probs": "abc"}), ("mess3", {"initial_state": "abc"}), ("fanizza", {"alpha": math.inf}),
    ("post_quantum", {"log_alpha": 1_000.0}), ("nonergodic", {"components": [{"process": "coin", "p": "half"}]}),
    ("nonergodic", {"components": [{"process": "coin", "weight": "heavy"}]}),
    ("nonergodic", {"components": [{"process": "coin", "vocab_map": 3}]}),
])
def test_a_parameter_of_the_wrong_type_is_refused_as_a_process_error(name, params):
    """Components come from config files with no types declared: a traceback would be all the user sees."""
    with pytest.raises(ProcessError):
        make_process(name, **params)


@pytest.mark.parametrize("name, params", [
    ("coin", {"p": 0.0}), ("coin", {"p": 1.0}), ("even_ones", {"p": 1.0}), ("even_ones", {"p": 0.0}),
    ("no_consecutive_ones", {"p": 1.0}), ("no_consecutive_ones", {"p": 0.0}), ("zero_one_random", {"p": 1.0}),
    ("mess3", {"x": 0.5, "a": 1.0}), ("mess3", {"x": 0.3, "a": 0.0}), ("rrxor", {"p1": 0.0, "p2": 1.0}),
    ("leaky_rrxor", {"epsilon": 1.0}), ("mr_name", {"p": 0.0, "q": 1.0}), ("sns", {"p": 1.0, "q": 1.0}),
    ("coin", {"add_eos": True, "eos_prob": 1.0})])
def test_the_ends_of_every_allowed_range_are_processes(name, params):
    process = make_process(name, **params)
    words = process.sample(50, 6, seeded(1))
    assert torch.isfinite(process.log_prob(words)).all()
    assert weights_of(process, 3).sum() == pytest.approx(1)


def test_an_unknown_process_is_answered_with_the_nearest_and_the_list():
    with pytest.raises(ProcessError, match="did you mean 'mess3'") as caught:
        make_process("mes3")
    assert all(name in str(caught.value) for name in [*PROCESSES, "nonergodic", "custom"])
    with pytest.raises(ProcessError, match="did you mean 'days_of_week'"):  # a word of one name alone
        make_process("days")
    with pytest.raises(ProcessError, match="unknown process 'zzzz'") as caught:
        make_process("zzzz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name, params, message", [
    ("mess3", {"p": 0.5}, "'p': it takes x, a"), ("days_of_week", {"p": 0.5}, "takes none"),
    ("custom", {"x": 1}, "takes matrices"), ("nonergodic", {"a": 1}, "takes components")])
def test_a_parameter_the_process_does_not_have_is_refused(name, params, message):
    with pytest.raises(ProcessError, match=message):
        make_process(name, **params)


def test_every_parameter_of_every_process_is_a_setting_without_a_default():
    assert {"x", "p1", "open_probs", "matrices", "components"} <= all_parameters()
    assert {getattr(Config, name) for name in all_parameters()} == {None}
    assert parameters("mess3") == ("x", "a") and parameters("nowhere") == ()


def test_a_config_builds_the_process_it_names():
    process = build_process(Config(process="mess3", x=0.12, a=0.7, add_bos=True, add_eos=True, eos_prob=0.3))
    expected = make_process("mess3", x=0.12, a=0.7, add_bos=True, add_eos=True, eos_prob=0.3)
    torch.testing.assert_close(process.transition_matrices, expected.transition_matrices)
    default = build_process(Config())
    torch.testing.assert_close(default.transition_matrices, make_process("mess3", x=0.05, a=0.85).transition_matrices)


@pytest.mark.parametrize("form", ["list", "npy", "npz", "named npz", "int npy", "path"])
def test_custom_matrices_come_from_a_list_or_a_file(form, tmp_path):
    expected = literal("sns", p=0.2, q=0.7)
    if form == "list":
        matrices = expected.tolist()
    elif form in ("npy", "path"):
        np.save(tmp_path / "T.npy", expected)
        matrices = tmp_path / "T.npy" if form == "path" else str(tmp_path / "T.npy")
    elif form == "int npy":
        expected = np.array([[[0, 1], [0, 0]], [[0, 0], [1, 0]]])
        np.save(tmp_path / "T.npy", expected)
        matrices = str(tmp_path / "T.npy")
    else:
        arrays = {"stack": expected} if form == "npz" else {"other": np.ones(3), "matrices": expected}
        np.savez(tmp_path / "T.npz", **arrays)
        matrices = str(tmp_path / "T.npz")
    process = make_process("custom", matrices=matrices)
    assert process.is_hmm
    np.testing.assert_allclose(process.transition_matrices, expected, atol=1e-12)
    np.testing.assert_allclose(process.stationary_state @ process.transition_matrices.sum(0), process.stationary_state)


def test_a_custom_stack_is_scaled_to_principal_eigenvalue_one():
    """Twice the weights, in another basis: the same words with the same probabilities, now as a GHMM."""
    rng = np.random.default_rng(0)
    T, basis = literal("mess3", x=0.1, a=0.7), rng.normal(size=(3, 3)) + 3 * np.eye(3)
    process = make_process("custom", matrices=(2 * np.linalg.inv(basis) @ T @ basis).tolist())
    plain = make_process("mess3", x=0.1, a=0.7)
    assert not process.is_hmm
    np.testing.assert_allclose(weights_of(process, 5), weights_of(plain, 5), atol=1e-12)
    np.testing.assert_allclose(process.entropies(6), plain.entropies(6), atol=1e-9)
    uniforms = torch.rand(6, 20_000, generator=seeded(1), dtype=torch.float64)
    observed = np.bincount(word_numbers(process.generate(uniforms)[0], 3), minlength=243)
    assert chi_square(observed, 20_000 * weights_of(plain, 5)) > 1e-4


@pytest.mark.parametrize("matrices, message", [
    (None, "needs matrices"), ("", "needs matrices"), ([], r"expected \[V, S, S\]"), ([[1.0]], r"expected \[V, S, S\]"),
    ([[[1.0, 0.0]]], r"shape \[1, 1, 2\]"), ([[[1.0], [0.0, 1.0]]], "cannot read"), ([[["a"]]], "cannot read"),
    ([[[math.nan]]], "NaN"), ([[[math.inf]]], "NaN or infinite"), ("absent.npy", "^absent.npy: no such file$"),
    ([[[0.0]], [[0.0]]], "eigenvalues"), ([[[0.0, 1.0], [-1.0, 0.0]]], "eigenvalues"),
    ([[[-1.0]], [[-1.0]]], "eigenvalues"),
])
def test_a_custom_stack_that_is_no_process_is_refused(matrices, message):
    with pytest.raises(ProcessError, match=message):
        make_process("custom", matrices=matrices)


@pytest.mark.parametrize("content", ["pickle", "pickle in npz", "empty", "text", "truncated", "two arrays", "complex"])
def test_a_file_that_holds_no_stack_is_refused(content, tmp_path):
    path = tmp_path / ("T.npz" if content in ("pickle in npz", "two arrays") else "T.npy")
    stack = literal("coin", p=0.3)
    if content == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif content == "pickle in npz":
        np.savez(path, matrices=np.array([{"a": 1}], dtype=object))
    elif content == "two arrays":
        np.savez(path, a=stack, b=stack)
    elif content == "complex":
        np.save(path, stack + 0.5j)
    elif content == "truncated":
        np.save(path, stack)
        path.write_bytes(path.read_bytes()[:-4])
    else:
        path.write_bytes(b"" if content == "empty" else b"0.3 0.7\n")
    with pytest.raises(ProcessError, match="T\\.np"):
        make_process("custom", matrices=str(path))


def disguised(T: np.ndarray, seed: int = 3) -> np.ndarray:
    basis = np.random.default_rng(seed).normal(size=T.shape[1:]) + 2 * np.eye(T.shape[1])
    return np.linalg.inv(basis) @ T @ basis


@pytest.mark.parametrize("depth", [1, 2, 6, 12])
def test_a_word_of_negative_weight_is_found_and_named(depth):
    """After a 0, token 0 again and again turns a vector by a small angle until its weight is below 0."""
    angle = 1.4 * math.pi / 2 / depth
    turn = 0.5 * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    # In state (1, 0) of the plane the weight of any continuation is its first coordinate; token 1 starts anew.
    T0 = turn
    T1 = np.outer(np.array([1.0, 0.0]) - turn @ np.array([1.0, 0.0]), [1.0, 0.0])
    stack = np.stack([T0, T1])
    for matrices in (stack, disguised(stack)):
        with pytest.raises(ProcessError, match="negative weight") as caught:
            make_process("custom", matrices=matrices.tolist())
        text = str(caught.value)
        prefix, token = text[text.index("[") + 1 : text.index("]")], int(text.split("the token ")[1].split()[0])
        word = [int(x) for x in prefix.split(",") if x.strip()] + [token]
        M = matrices.sum(0)
        values, right = np.linalg.eig(M)
        _, left = np.linalg.eig(M.T)
        r = right[:, values.real.argmax()].real
        v = left[:, np.linalg.eigvals(M.T).real.argmax()].real
        v = v / (v @ r)
        for x in word:
            v = v @ matrices[x]
        assert v @ r < -1e-9, f"the named word {word} has weight {v @ r}"


def test_several_stationary_states_need_an_initial_state():
    matrices = [np.diag([0.2, 0.6]).tolist(), np.diag([0.8, 0.4]).tolist()]
    with pytest.raises(ProcessError, match="several stationary states.*initial_state"):
        make_process("custom", matrices=matrices)
    with pytest.raises(ProcessError, match="several stationary states"):
        make_process("mess3", x=0.0)
    process = make_process("custom", matrices=matrices, initial_state=[0.25, 0.75])
    mixture = make_process("nonergodic", components=[{"process": "coin", "p": 0.2}, {"process": "coin", "p": 0.6,
                                                                                     "weight": 3}])
    np.testing.assert_allclose(weights_of(process, 6), weights_of(mixture, 6), atol=1e-12)
    assert abs(process.entropy_rate() - mixture.entropy_rate()) < 1e-9


def test_an_initial_state_of_the_wrong_length_is_refused_where_several_states_are_stationary():
    matrices = [np.diag([0.2, 0.6]).tolist(), np.diag([0.8, 0.4]).tolist()]
    with pytest.raises(ProcessError, match="initial_state must be 2 numbers"):
        make_process("custom", matrices=matrices, initial_state=[0.2, 0.3, 0.5])


def test_the_stationary_state_sums_to_one_whatever_the_scale_of_the_initial_state():
    matrices = [np.diag([0.2, 0.6]).tolist(), np.diag([0.8, 0.4]).tolist()]
    process = make_process("custom", matrices=matrices, initial_state=[1, 3])
    np.testing.assert_allclose(process.initial_state, [0.25, 0.75])
    np.testing.assert_allclose(process.stationary_state, [0.25, 0.75])


def test_transient_states_are_left_for_good():
    """A state nothing returns to: stationary weight 0, yet sequences may start there."""
    matrices = [[[0.0, 0.5, 0.0], [0, 0.7, 0.0], [0, 0, 0.6]], [[0.0, 0.0, 0.5], [0, 0.3, 0.0], [0, 0, 0.4]]]
    process = make_process("custom", matrices=matrices, initial_state=[1, 0, 0])
    np.testing.assert_allclose(process.stationary_state, [0, 0.5, 0.5], atol=1e-12)
    assert process.word_probability([0, 0]) == pytest.approx(0.35)
    assert abs(process.entropy_rate() - (binary_entropy(0.7) + binary_entropy(0.6)) / 2) < 1e-9


# Mixtures and frames -----------------------------------------------------------------------------------------------

def test_a_mixture_weighs_its_components_and_renames_their_tokens():
    process = make_process("nonergodic", components=COINS)  # coin(0.3) says 2, 0 for 0, 1
    assert process.vocab_size == 3 and process.num_states == 2
    np.testing.assert_allclose(process.initial_state, [0.75, 0.25])
    assert process.word_probability([2, 2]) == pytest.approx(0.75 * 0.3**2)
    assert process.word_probability([0, 0]) == pytest.approx(0.75 * 0.7**2 + 0.25 * 0.6**2)
    assert process.word_probability([1]) == pytest.approx(0.25 * 0.4)
    assert process.word_probability([2, 1]) == 0
    np.testing.assert_allclose(process.beliefs([[2, 0]])[0, 1:], [[1, 0], [1, 0]], atol=1e-12)
    posterior = 0.75 * 0.7 / (0.75 * 0.7 + 0.25 * 0.6)
    np.testing.assert_allclose(process.beliefs([[0]])[0, 1], [posterior, 1 - posterior], atol=1e-12)


def test_a_mixture_of_mixtures_is_the_flat_mixture():
    inner = {"process": "nonergodic", "weight": 2, "vocab_map": [1, 0, 2], "components": COINS}
    nested = make_process("nonergodic", components=[inner, {"process": "sns", "p": 0.2, "q": 0.7}])
    flat = make_process("nonergodic", components=[
        {"process": "coin", "p": 0.3, "weight": 1.5, "vocab_map": [2, 1]},
        {"process": "coin", "p": 0.6, "weight": 0.5, "vocab_map": [1, 0]}, {"process": "sns", "p": 0.2, "q": 0.7}])
    np.testing.assert_allclose(weights_of(nested, 4), weights_of(flat, 4), atol=1e-12)
    torch.testing.assert_close(nested.initial_state, flat.initial_state)


def test_a_mixture_of_ghmms_has_the_weighted_word_probabilities_of_its_parts(processes):
    mixture, shares = processes["ghmm_mixture"], np.array([2, 1, 0.5]) / 3.5
    parts = [make_process("mess3", x=0.1, a=0.7), make_process("sns", p=0.4, q=0.7), processes["fanizza"]]
    maps = [{0: 0, 1: 1, 2: 2}, {2: 0, 1: 1}, {0: 0, 1: 1}]
    for word in words_of(mixture, 3):
        expected = sum(share * weight(part, [names[x] for x in word])
                       for part, names, share in zip(parts, maps, shares, strict=True) if all(x in names for x in word))
        assert mixture.word_probability(word) == pytest.approx(expected, abs=1e-12)


def test_a_component_may_start_in_a_state_of_its_own():
    process = make_process("nonergodic", components=[
        {"process": "sns", "p": 0.2, "q": 0.7, "initial_state": [0, 1]}, {"process": "coin", "p": 0.5, "weight": 3}])
    np.testing.assert_allclose(process.initial_state, [0, 0.25, 0.75])
    assert process.word_probability([1]) == pytest.approx(0.25 * 0.7 + 0.75 * 0.5)


def test_sequences_start_in_the_initial_state_that_was_asked_for():
    process = make_process("sns", p=0.2, q=0.7, initial_state=[0, 5])  # scaled to weight 1
    np.testing.assert_allclose(process.initial_state, [0, 1])
    np.testing.assert_allclose(process.beliefs([[1]])[0], [[0, 1], [1, 0]], atol=1e-12)
    assert process.word_probability([1, 0]) == pytest.approx(0.7)
    ghmm = make_process("fanizza", alpha=1.3, lamb=0.45)
    reset = ghmm.transition_matrices[0, 0]
    after = make_process("fanizza", alpha=1.3, lamb=0.45, initial_state=reset.tolist())
    expected = [weight(ghmm, (0, *w)) / weight(ghmm, (0,)) for w in words_of(ghmm, 4)]
    np.testing.assert_allclose(weights_of(after, 4), expected, atol=1e-12)


def test_bos_begins_every_sequence_and_appears_nowhere_else():
    plain, framed = make_process("mess3"), make_process("mess3", add_bos=True)
    assert framed.vocab_size == 4
    for word in words_of(plain, 3):
        assert framed.word_probability([3, *word]) == pytest.approx(plain.word_probability(word), rel=1e-10)
        assert framed.word_probability([*word, 3]) == 0


def test_eos_ends_a_sequence_after_which_a_fresh_one_starts():
    plain = make_process("sns", p=0.2, q=0.7, initial_state=[0.1, 0.9])
    framed = make_process("sns", p=0.2, q=0.7, initial_state=[0.1, 0.9], add_bos=True, add_eos=True, eos_prob=0.3)
    eos, bos = 2, 3
    first, second = [0, 1], [1, 0, 0]
    expected = 0.7**2 * plain.word_probability(first) * 0.3 * 0.7**3 * plain.word_probability(second)
    assert framed.word_probability([bos, *first, eos, bos, *second]) == pytest.approx(expected, rel=1e-10)
    assert framed.word_probability([bos, *first, eos, 0]) == 0
    assert framed.word_probability([bos, eos]) == pytest.approx(0.3)
    bare = make_process("sns", p=0.2, q=0.7, initial_state=[0.1, 0.9], add_eos=True, eos_prob=0.3)
    assert bare.word_probability([*first, eos, *second]) == pytest.approx(expected, rel=1e-10)


# Batches -----------------------------------------------------------------------------------------------------------

def batches_of(rank: int = 0, world_size: int = 1, spec: dict | None = None, batch: int = 8, **settings) -> Batches:
    cfg = Config(device="cpu", batch_size=batch, n_ctx=5, **(spec or {}), **settings)
    rt = Runtime(cfg)
    rt.rank, rt.world_size = rank, world_size
    return Batches(rt, build_process(cfg), cfg)


@pytest.mark.parametrize("spec", [{}, {"process": "fanizza"}], ids=["hmm", "ghmm"])
def test_a_batch_is_a_function_of_seed_and_step_on_any_number_of_ranks(spec):
    one = batches_of(spec=spec)
    expected = [one(step) for step in range(3)]
    assert expected[0].shape == (8, 6) and not torch.equal(expected[0], expected[1])
    assert torch.equal(batches_of(spec=spec)(2), expected[2])
    assert not torch.equal(batches_of(spec=spec, seed=1)(2), expected[2])
    for rank in range(2):
        assert torch.equal(batches_of(rank, 2, spec)(2), expected[2][rank::2])


@pytest.mark.parametrize("name", ["zero_one_random", "fanizza"])
def test_carried_batches_go_on_where_the_last_ones_stopped(name):
    """Every batch starts anew unless carried: then all of them joined are one sequence of the process."""
    long = {}
    for carry in (False, True):
        batches = batches_of(spec={"process": name}, carry_state=carry)
        long[carry] = torch.cat([batches(step) for step in range(12)], 1)
        rows = torch.stack([batches(12), batches(13)])
        assert rows.shape == (2, 8, 6)
    process = make_process(name)
    assert torch.isfinite(process.log_prob(long[True])).all()
    if name == "zero_one_random":  # 3-cycles: joining unrelated batches breaks the phase almost surely
        assert torch.isinf(process.log_prob(long[False])).any()
    else:
        drawn = [torch.rand((8, 7), generator=batches.rt.generator(s), dtype=torch.float64)[:, 1:] for s in range(12)]
        joined, _ = process.generate(torch.cat([torch.zeros(8, 1).double(), *drawn], 1).t().contiguous())
        assert torch.equal(joined, long[True])


def moved(left: list, ranks: int, **settings) -> list:
    """Batches of so many ranks that take up what others left."""
    batches = [batches_of(rank, ranks, carry_state=True, **settings) for rank in range(ranks)]
    for each in batches:
        each.take_up(left)
    return batches


@pytest.mark.parametrize("name", ["zero_one_random", "fanizza"])
def test_carried_sequences_go_on_over_one_two_and_one_ranks(name):
    spec = {"process": name}
    alone = batches_of(spec=spec, carry_state=True)
    expected = [alone(step) for step in range(6)]
    first = batches_of(spec=spec, carry_state=True)
    assert first.left() is None
    assert torch.equal(first(0), expected[0]) and torch.equal(first(1), expected[1])
    two = moved([first.left()], 2, spec=spec)
    for step in (2, 3):
        for rank, batches in enumerate(two):
            assert torch.equal(batches(step), expected[step][rank::2])
    last, = moved([batches.left() for batches in two], 1, spec=spec)
    assert torch.equal(last(4), expected[4]) and torch.equal(last(5), expected[5])


def test_carried_sequences_are_not_taken_up_where_batches_start_anew_or_are_of_another_size():
    left = [torch.zeros(8, dtype=torch.int64)]
    anew = batches_of(spec={"process": "zero_one_random"})
    anew.take_up(left)
    assert anew.carried is None
    moved([None], 1)  # a checkpoint of before there was anything to carry
    with pytest.raises(InputError, match="8 sequences, but batch_size = 16: use batch_size=8"):
        batches_of(carry_state=True, spec={"process": "zero_one_random"}, batch=16).take_up(left)


@pytest.mark.parametrize("before, after", [("rrxor", "even_ones"), ("rrxor", "fanizza"), ("fanizza", "rrxor"),
                                           ("tom_quantum", "fanizza")])
def test_carried_sequences_of_another_process_are_refused(before, after):
    """Unless they fit: those of two states go on in a process of three."""
    carried = batches_of(spec={"process": before}, carry_state=True)
    for step in range(6):
        carried(step)
    with pytest.raises(InputError, match=f"sequences of another process than {after}: use carry_state=false"):
        moved([carried.left()], 1, spec={"process": after})
    fewer = batches_of(spec={"process": "even_ones"}, carry_state=True)
    fewer(0)
    more, = moved([fewer.left()], 1, spec={"process": "zero_one_random"})
    assert more(1).shape == (8, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")
def test_carried_sequences_go_to_the_device_of_the_process():
    batches = batches_of(spec={"process": "zero_one_random"}, carry_state=True)
    batches.process.to("cuda")
    batches.take_up([torch.zeros(8, dtype=torch.int64)])
    assert batches.carried.is_cuda
    assert batches(0).shape == (8, 6) and not batches.left().is_cuda


# Rare events, notes, fingerprints, help ------------------------------------------------------------------------------

@pytest.mark.parametrize("rare", [1e-12, 1e-14, 1e-20, 1e-100])
def test_a_rare_event_keeps_its_probability(rare):
    """Even ten of them in a row, between two rescalings."""
    process = make_process("custom", matrices=[[[1 - rare]], [[rare]]])
    assert process.log_prob([[1, 0, 1]])[0].tolist() == pytest.approx([math.log(rare), 0, math.log(rare)], abs=1e-9)
    assert float(process.log_prob([[1] * 10]).sum()) == pytest.approx(10 * math.log(rare), rel=1e-9)
    torch.testing.assert_close(process.beliefs([[1] * 10]), torch.ones(1, 11, 1).double())
    words, weights = process.all_words(1, 10)
    assert words.tolist() == [[0], [1]] and weights.tolist() == pytest.approx([1, rare], rel=1e-9)


def test_a_rare_change_of_state_keeps_its_probability_and_makes_no_second_component():
    rare, back = 1e-15, 1e-3
    stay, there = [[0.5 - rare / 2, 0], [0, 0.25]], [[0.5 - rare / 2, rare], [back, 0.75 - back]]
    process = make_process("custom", matrices=[stay, there])
    share = rare / (rare + back)
    assert process.stationary_state.tolist() == pytest.approx([1 - share, share], rel=1e-9)
    slow = make_process("custom", matrices=[[[1 - 1e-11, 0], [0, 1 - 3e-11]], [[0, 1e-11], [3e-11, 0]]])
    assert slow.stationary_state.tolist() == pytest.approx([0.75, 0.25], rel=1e-6)


def test_rare_events_and_states_left_for_good_of_weights_that_are_no_probabilities():
    """Rows of other sums: positive weights still, so nothing is rounding."""
    rare = 1e-16
    process = make_process("custom", matrices=[[[0.3, 0, 0], [0, 0.5, 0.2], [0, 0.1, 0.7]],
                                               [[0, rare, 0], [0, rare, 0], [0, 0, 2 * rare]],
                                               [[0, 0.2, 0], [0, 0, 0], [0, 0, 0]]])
    assert not process.is_hmm and process.stationary_state[0] == 0
    r, pi = process.normalizing_eigenvector, process.stationary_state
    expected = pi @ process.transition_matrices[1] @ r / (pi @ r)
    assert float(expected) < 1e-14
    assert process.word_probability([1]) == pytest.approx(float(expected), rel=1e-9)
    assert torch.isinf(process.log_prob([[2]])).all()


def test_what_is_left_for_good_stays_impossible():
    """A transient state has no stationary weight, not even that of rounding."""
    process = make_process("custom", matrices=[[[0.3, 0, 0], [0, 0.5, 0.2], [0, 0.1, 0.6]],
                                               [[0.5, 0, 0], [0, 0.3, 0], [0, 0, 0.3]],
                                               [[0, 0.2, 0], [0, 0, 0], [0, 0, 0]]])
    assert process.stationary_state[0] == 0
    assert torch.isinf(process.log_prob([[2]])).all()


def test_scaled_matrices_are_said_and_others_are_not():
    notes = make_process("custom", matrices=[[[1.0]], [[3.0]]]).notes
    assert len(notes) == 1 and "divided by 4," in notes[0]
    assert make_process("custom", matrices=[[[0.25]], [[0.75]]]).notes == []
    assert make_process("post_quantum").notes == [] == make_process("mess3").notes
    framed = make_process("custom", matrices=[[[1.0]], [[3.0]]], add_bos=True)
    assert len(framed.notes) == 1
    mixed = make_process("nonergodic", components=[{"process": "custom", "matrices": [[[1.0]], [[3.0]]]},
                                                   {"process": "coin"}])
    assert len(mixed.notes) == 1
    alike = {"process": "custom", "matrices": [[[1.0]], [[3.0]]]}
    assert make_process("nonergodic", components=[alike, alike]).notes == mixed.notes
    digits = make_process("custom", matrices=[[[0.25]], [[0.74999999]]]).notes
    assert len(digits) == 1 and "divided by 0.99999999," in digits[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_whose_rows_do_not_add_up_to_1_are_said(transposed):
    T = np.array([[[0.5, 0.2], [0.1, 0.2]], [[0.1, 0.2], [0.3, 0.3]]])  # rows of the sum: 1, 0.9
    if transposed:
        T = literal("no_consecutive_ones", p=0.3).transpose(0, 2, 1)
    note, = make_process("custom", matrices=T.tolist()).notes
    rows = "0.3 to 1.7" if transposed else "0.9 to 1"
    assert f"rows of the sum of its matrices add up to {rows}, not to 1" in note
    assert ("transpose" in note) == transposed == note.endswith("Taken for a generalised process as they are")


def test_a_process_from_a_file_has_its_name(tmp_path):
    np.save(tmp_path / "bits.npy", literal("coin", p=0.3))
    np.save(tmp_path / "odd.npy", np.ones((2, 3, 2)))
    assert make_process("custom", matrices=str(tmp_path / "bits.npy")).name == "bits.npy"
    with pytest.raises(ProcessError, match=r"odd\.npy: matrices have shape \[2, 3, 2\]; expected \[V, S, S\]"):
        make_process("custom", matrices=str(tmp_path / "odd.npy"))
    np.savez(tmp_path / "two.npz", a=np.ones(1), b=np.ones(1))
    with pytest.raises(ProcessError, match=r"two\.npz has no array called 'matrices'.*it holds: a, b"):
        make_process("custom", matrices=str(tmp_path / "two.npz"))
    (tmp_path / "bits.json").write_text("[[[1.0]]]")
    with pytest.raises(ProcessError, match=r"bits\.json is no \.npy or \.npz file: write numbers .* with numpy\.save$"):
        make_process("custom", matrices=str(tmp_path / "bits.json"))
    with pytest.raises(ProcessError, match=r"none\.npy: no such file$"):
        make_process("custom", matrices=str(tmp_path / "none.npy"))


def test_no_entropy_is_below_0_by_rounding():
    certain = make_process("zero_one_random", p=1.0, initial_state=[1.0, 0.0, 0.0])
    assert (certain._entropy(torch.tensor([1 + 1e-15, 0, 0]).double()) == 0).all()
    assert not certain.optimal_loss(6).any() and certain.entropy_rate() >= 0


def test_a_fingerprint_is_of_matrices_as_they_were_read(tmp_path):
    path = tmp_path / "T.npy"

    def print_of(matrices, **options) -> str:
        np.save(path, np.array(matrices))
        return make_process("custom", matrices=str(path), **options).fingerprint

    one = print_of([[[0.25]], [[0.75]]])
    assert re.fullmatch("[0-9a-f]{16}", one) and print_of([[[0.25]], [[0.75]]]) == one
    assert print_of([[[1.0]], [[3.0]]]) != one  # the same process, other numbers
    assert print_of([[[0.25, 0.75], [0.5, 0.5]]]) != print_of([[[0.25]], [[0.75]], [[0.5]], [[0.5]]])  # other shape
    assert print_of([[[0.25]], [[0.75]]], add_eos=True) == one
    assert make_process("mess3").fingerprint == "" == make_process("mess3", add_bos=True).fingerprint
    mixtures = []
    for weight in (0.25, 0.5):
        np.save(path, np.array([[[weight]], [[1 - weight]]]))
        parts = [{"process": "coin"}, {"process": "custom", "matrices": str(path)}]
        mixtures.append(make_process("nonergodic", components=parts).fingerprint)
    assert len(set(mixtures)) == 2 and all(re.fullmatch("[0-9a-f]{16}", each) for each in mixtures)
    assert make_process("nonergodic", components=[{"process": "coin"}]).fingerprint == ""


def test_help_lists_every_process_with_the_defaults_of_its_parameters(capsys):
    with pytest.raises(SystemExit) as ended:
        configure(Config, ["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "  mess3(x=0.05, a=0.85)  Mess3" in out and "  days_of_week()  " in out and "  custom(matrices)  " in out
    for name, function in PROCESSES.items():
        line, = (line for line in out.splitlines() if line.startswith(f"  {name}("))
        for parameter in inspect.signature(function).parameters.values():
            assert f"{parameter.name}={parameter.default}" in line


def test_one_state_is_a_state_and_two_are_states():
    assert [counted(number, "state") for number in (0, 1, 2)] == ["0 states", "1 state", "2 states"]
    with pytest.raises(ProcessError, match="initial_state must be 1 number, "):
        make_process("coin", initial_state=[0.5, 0.5])
