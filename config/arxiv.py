# The published model on five arXiv categories, after
#   python prepare_data.py arxiv --out_dir=data/arxiv     (from the hub; or --input=FILE.jsonl)
# One GPU, also for all 31 subsets (--study=all31 --out_dir=out/arxiv_study).
out_dir = "out/arxiv_published"
data = "data/arxiv"
categories = ["cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL"]
n_layers = 6
d_model = 256
n_heads = 4
d_mlp = 1_024
dropout = 0.1
batch_size = 512
grad_accum = 4
lr = 5e-4
epochs = 20
warmup_steps = 1_000
