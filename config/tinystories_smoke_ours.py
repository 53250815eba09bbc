# Ours, beside APEL-R's tinystories_smoke.py: version 1 on characters, does everything run?
# Before: python prepare_data.py text --input=tinystories --tokenizer=char --max_bytes=5e6 \
#   --out_dir=data/tinystories_char
out_dir = "out/tinystories_smoke_ours"
data = "data/tinystories_char"
version = "v1_filtered_mixture"
seq_len = 128
num_plan_states = 4
token_dim = 64
d_model = 128
fusion_dim = 96
n_layers = 1
batch_size = 16
lr = 3e-3
max_steps = 100
eval_interval = 50
entropy_reg_weight = 1e-3
usage_balance_weight = 0.02
