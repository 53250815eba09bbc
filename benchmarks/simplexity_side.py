"""Simplexity's side of `bench.py ghmm`, run by the Python that has JAX: imports nothing of this repository.

    PYTHON simplexity_side.py CHECKOUT FOLDER    # FOLDER/tokens.npy: words of Mess3 [B, L]

Answers questions, a JSON line each: {"window": kind, "lasting": s} the median seconds of s seconds of calls, {"total":
"log_prob"} the log-probability of all words. Every call is jitted as a whole, and waited for.
"""

import inspect
import json
import statistics
import sys
import time
from pathlib import Path

checkout, folder = sys.argv[1:]
sys.path.insert(0, checkout)

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from simplexity.generative_processes.hidden_markov_model import HiddenMarkovModel  # noqa: E402
from simplexity.generative_processes.transition_matrices import mess3  # noqa: E402

process = HiddenMarkovModel(mess3(x=0.05, a=0.85))
tokens = jnp.asarray(np.load(Path(folder) / "tokens.npy").astype(np.int32))
batch, length = tokens.shape
states = jnp.repeat(process.initial_state[None], batch, axis=0)
# What of the states to return: one flag in some versions, two in others.
flags = [False for name in inspect.signature(HiddenMarkovModel.generate).parameters if name.startswith("return_")]


@eqx.filter_jit
def sampling(process, key):
    return process.generate(states, jax.random.split(key, batch), length, *flags)


@eqx.filter_jit
def beliefs(process, tokens):
    def along(word):
        def follow(state, token):
            state = process.transition_states(state, token)
            return state, state

        return jax.lax.scan(follow, process.initial_state, word)[1]

    return jax.vmap(along)(tokens)


@eqx.filter_jit
def log_prob(process, tokens):
    return jax.vmap(process.log_probability)(tokens)


keys = iter(jax.random.split(jax.random.PRNGKey(0), 100_000))
calls = {
    "sampling": lambda: sampling(process, next(keys)),
    "beliefs": lambda: beliefs(process, tokens),
    "log_prob": lambda: log_prob(process, tokens),
}
for call in calls.values():  # compile
    jax.block_until_ready(call())
for line in sys.stdin:
    question = json.loads(line)
    if "total" in question:
        answer = float(np.asarray(log_prob(process, tokens), np.float64).sum())
    else:
        times = []
        while not times or sum(times) < question["lasting"]:
            began = time.perf_counter()
            jax.block_until_ready(calls[question["window"]]())
            times.append(time.perf_counter() - began)
        answer = statistics.median(times)
    print(json.dumps(answer), flush=True)
