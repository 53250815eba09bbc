# The same for version 1, whose chunks begin one token later. Before:
#   python prepare_data.py planted --version=v1_filtered_mixture --out_dir=data/planted_v1
from pathlib import Path

exec(Path(__file__).with_name("planted.py").read_text())
out_dir = "out/planted_v1"
data = "data/planted_v1"
version = "v1_filtered_mixture"
seq_len = 128
fusion_dim = 64
loss_weights = None  # those are of version 2
usage_balance_weight = 0.1
