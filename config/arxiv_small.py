# A small model for all 31 subsets of the five categories on two CPU cores, on titles and abstracts:
#   python prepare_data.py arxiv --input=FOLDER --vocab_size=2048 --out_dir=data/arxiv
#   python train_arxiv.py config/arxiv_small.py --study=all31
out_dir = "out/arxiv_small"
data = "data/arxiv"
categories = ["cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL"]
n_layers = 2
d_model = 64
n_heads = 4
d_mlp = 256
dropout = 0.0
batch_size = 32
lr = 3e-3
epochs = 4
warmup_steps = 50
bootstrap = 300
