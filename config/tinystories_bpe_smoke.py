# The name is that of a file of APEL-R that was never public: the values are ours.
# As tinystories_smoke_ours.py on BPE tokens, with the losses that make plans identifiable.
# Before: python prepare_data.py text --input=tinystories --vocab_size=2048 --max_bytes=2e7 \
#   --out_dir=data/tinystories_2k
from pathlib import Path

exec(Path(__file__).with_name("tinystories_smoke_ours.py").read_text())
out_dir = "out/tinystories_bpe_smoke"
data = "data/tinystories_2k"
token_dim = 128
d_model = 192
fusion_dim = 128
chunk_bow_weight = 0.1
chunk_bow_warmup_steps = 50
plan_mi_weight = 0.02
