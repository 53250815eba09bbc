# The name is that of a file of APEL-R that was never public: the values are ours.
# As tinystories_bpe_ident_iter.py at the published size, with a recognizer pulled towards the posterior. One GPU.
from pathlib import Path

exec(Path(__file__).with_name("tinystories_bpe_ident_iter.py").read_text())
out_dir = "out/tinystories_bpe_ident_cpk_scale"
d_model = 768
fusion_dim = 512
batch_size = 64
lr = 6e-4
max_steps = 40_000
chunk_post_kl_weight = 0.05
