# APEL-R's configs/tinystories_iter.yaml, values and defaults: as tinystories_smoke.py, larger and longer.
# Before: python prepare_data.py text --input=tinystories --tokenizer=char --min_chars=16 --max_documents=10000 \
#   --val_fraction=0.1 --out_dir=data/tinystories_iter
from pathlib import Path

exec(Path(__file__).with_name("tinystories_smoke.py").read_text())
out_dir = "out/tinystories_iter"
data = "data/tinystories_iter"
prepare = {"input": "tinystories", "tokenizer": "char", "min_chars": 16, "max_documents": 10_000, "val_fraction": 0.1}
seq_len = 128
num_plan_states = 8
num_experts = 8
token_dim = 224
d_model = 640
fusion_dim = 448
batch_size = 14
lr = 7e-4
max_steps = 200
eval_interval = 100
eval_batches = 20
final_eval_batches = 20
preview_tokens = 120
usage_balance_weight = 0.1
