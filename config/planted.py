# A known plan: four plans, each a hidden Markov model of its own, change every 16 tokens. The exact optimum is known.
# Before: python prepare_data.py planted            Then: nmi 0.99 and 0.9% above the optimum in 3 minutes on two cores.
out_dir = "out/planted"
data = "data/planted"
seq_len = 127
num_plan_states = 4
chunk_size = 16
token_dim = 32
d_model = 64
n_layers = 1
batch_size = 64
lr = 5e-3
max_steps = 2_000
eval_interval = 200
eval_batches = 64  # all of the validation documents
loss_weights = {"usage_balance": 0.1}
preview_tokens = 0
