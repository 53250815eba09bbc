# Mess3 as published: the network of Shai et al. (2024, arXiv:2405.15943, 4 layers of one narrow head, context 10),
# trained for 100k small batches. AdamW stands in for the paper's plain SGD, which needs ten times the steps.
# The default `python train_ghmm.py` is the same experiment in fewer, larger batches, and many times faster.
out_dir = "out/ghmm_mess3"
process = "mess3"
x = 0.05
a = 0.85
n_ctx = 10
n_layers = 4
d_model = 64
n_heads = 1
d_head = 8
d_mlp = 256
batch_size = 64
lr = 1e-3
max_steps = 100_000
warmup_steps = 1_000
log_interval = 1_000
eval_interval = 5_000
