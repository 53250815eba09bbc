# RRXOR (two random bits, then their exclusive or): five states, 36 beliefs, spread over the layers (Shai et al. 2024,
# arXiv:2405.15943). A recurrent network can use the first bit only if it carries it, so it carries the belief. A
# transformer reaches the same floor, but may look the bit up when it is due: --model=transformer holds less of it.
# Two CPU cores: 1 minute.
out_dir = "out/ghmm_rrxor"
process = "rrxor"
p1 = 0.5
p2 = 0.5
n_ctx = 10
model = "gru"
n_layers = 2
batch_size = 64
max_steps = 3_000
