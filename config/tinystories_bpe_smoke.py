# Version 1 on BPE tokens with the losses that make plans identifiable, short.
# Before: python prepare_data.py text --input=tinystories --vocab_size=2048 --max_bytes=2e7 \
#   --out_dir=data/tinystories_2k
out_dir = "out/tinystories_bpe_smoke"
data = "data/tinystories_2k"
version = "v1_filtered_mixture"
seq_len = 128
num_plan_states = 4
token_dim = 128
hidden_dim = 192
fusion_dim = 128
num_layers = 1
batch_size = 16
lr = 3e-3
max_steps = 100
eval_interval = 50
entropy_reg_weight = 1e-3
usage_balance_weight = 0.02
chunk_bow_weight = 0.1
chunk_bow_warmup_steps = 50
plan_mi_weight = 0.02
