# The name is that of a file of APEL-R that was never public: the values are ours.
# Planner-required experts on TinyStories, quick to iterate on: one GPU, bf16 where the GPU has it.
# Before: python prepare_data.py text --input=tinystories --vocab_size=4096 --out_dir=data/tinystories
out_dir = "out/v2_fast"
data = "data/tinystories"
seq_len = 256
num_plan_states = 8
chunk_size = 16
token_dim = 256
d_model = 768
dropout = 0.1
batch_size = "auto"
cpu_batch_size = 8
lr = 6e-4
max_steps = 6_000
warmup_steps = 300
eval_interval = 500
log_interval = 20
loss_weights = {"usage_balance": 0.02, "future_contrastive": 0.02, "boundary_entropy": 1e-3}
preview_prompt = "Once upon a time"
