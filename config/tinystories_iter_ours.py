# Ours, beside APEL-R's tinystories_iter.py: version 1 on characters of TinyStories, longer.
# Before: python prepare_data.py text --input=tinystories --tokenizer=char --max_bytes=5e7 \
#   --out_dir=data/tinystories_char
out_dir = "out/tinystories_iter_ours"
data = "data/tinystories_char"
version = "v1_filtered_mixture"
seq_len = 256
num_plan_states = 8
token_dim = 128
d_model = 384
fusion_dim = 256
batch_size = 32
lr = 1.5e-3
max_steps = 5_000
warmup_steps = 200
eval_interval = 500
dropout = 0.1
entropy_reg_weight = 1e-3
usage_balance_weight = 0.02
