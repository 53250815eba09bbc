# APEL-R's configs/tinystories_small.yaml, values and defaults: as tinystories_iter.py, at the size of its defaults.
# Before: python prepare_data.py text --input=tinystories --tokenizer=char --min_chars=16 --max_documents=18000 \
#   --val_fraction=0.066666 --out_dir=data/tinystories_small
from pathlib import Path

exec(Path(__file__).with_name("tinystories_iter.py").read_text())
out_dir = "out/tinystories_small"
data = "data/tinystories_small"
prepare = {
    "input": "tinystories",
    "tokenizer": "char",
    "min_chars": 16,
    "max_documents": 18_000,
    "val_fraction": 0.066666,
}
token_dim = 256
d_model = 768
fusion_dim = 512
batch_size = 16
lr = 6e-4
max_steps = 400
