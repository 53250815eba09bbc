# A mixture that is not ergodic: each sequence comes from one of three components for good, and says only over time
# from which. The belief is over (component, state): in-context learning as Bayesian inference, with its exact optimum.
out_dir = "out/ghmm_nonergodic"
process = "nonergodic"
components = [
    {"process": "mess3", "x": 0.05, "a": 0.85, "weight": 1},
    {"process": "mess3", "x": 0.15, "a": 0.6, "weight": 1},
    {"process": "zero_one_random", "p": 0.5, "vocab_map": [0, 2], "weight": 1},
]
n_ctx = 32
batch_size = 128
max_steps = 2_500
eval_sequences = 512
max_words = 6_000  # far fewer than all contexts: a sample
