# The name is that of a file of APEL-R that was never public: the values are ours.
# Version 1 on BPE tokens with the losses that make plans identifiable.
# Before: python prepare_data.py text --input=tinystories --vocab_size=4096 --out_dir=data/tinystories
out_dir = "out/tinystories_bpe_ident_iter"
data = "data/tinystories"
version = "v1_filtered_mixture"
seq_len = 256
num_plan_states = 8
token_dim = 256
d_model = 512
fusion_dim = 384
dropout = 0.1
batch_size = 32
lr = 1e-3
max_steps = 10_000
warmup_steps = 500
eval_interval = 1_000
entropy_reg_weight = 1e-3
usage_balance_weight = 0.02
chunk_bow_weight = 0.1
chunk_bow_warmup_steps = 1_000
plan_mi_weight = 0.02
