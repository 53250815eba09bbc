# The name is that of a file of APEL-R that was never public: the values are ours.
# Goes on from tinystories_bpe_ident_cpk_scale.py with sharper plans.
from pathlib import Path

exec(Path(__file__).with_name("tinystories_bpe_ident_cpk_scale.py").read_text())
init_from = "out/tinystories_bpe_ident_cpk_scale/best.pt"
out_dir = "out/tinystories_bpe_ident_resume_sharp"
lr = 2e-4
max_steps = 10_000
entropy_reg_weight = 5e-3
chunk_bow_weight = 0.2
chunk_bow_warmup_steps = 0
plan_mi_weight = 0.05
