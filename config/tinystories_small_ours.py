# Ours, beside APEL-R's tinystories_small.py: version 1 on characters at the published size. One GPU.
# Before: python prepare_data.py text --input=tinystories --tokenizer=char --out_dir=data/tinystories_char
out_dir = "out/tinystories_small_ours"
data = "data/tinystories_char"
version = "v1_filtered_mixture"
seq_len = 256
num_plan_states = 8
token_dim = 256
d_model = 768
fusion_dim = 512
dropout = 0.1
batch_size = 64
lr = 6e-4
max_steps = 20_000
warmup_steps = 500
eval_interval = 1_000
entropy_reg_weight = 1e-3
usage_balance_weight = 0.02
