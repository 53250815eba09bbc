# Tom's quantum process: a qubit watched through four outcomes, which no finite hidden Markov model generates. Its
# beliefs are Bloch vectors, not probabilities of states, and fill a disc.
out_dir = "out/ghmm_tom_quantum"
process = "tom_quantum"
alpha = 1.0
beta = 7.14
n_ctx = 8  # 4^8 = 65,536 contexts: evaluated and analysed exactly
max_words = 70_000
max_steps = 3_000
batch_size = 2_048  # the floor is only 0.4% below chance: large batches to see it through the noise
lr = 2e-3
