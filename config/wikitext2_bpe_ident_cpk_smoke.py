# The name is that of a file of APEL-R that was never public: the values are ours.
# As wikitext2_bpe_ident_cpk.py, short and small.
from pathlib import Path

exec(Path(__file__).with_name("wikitext2_bpe_ident_cpk.py").read_text())
out_dir = "out/wikitext2_bpe_ident_cpk_smoke"
seq_len = 128
token_dim = 128
d_model = 192
fusion_dim = 128
n_layers = 1
num_plan_states = 4
batch_size = 8
max_steps = 100
warmup_steps = 20
chunk_bow_warmup_steps = 50
eval_interval = 50
