# APEL-R's configs/tinystories_selfbias_smoke.yaml, values and defaults: as tinystories_smoke.py, with plans
# that are loyal as version 2 has them anyway.
# Before: python prepare_data.py text --input=tinystories --tokenizer=char --min_chars=16 --max_documents=2500 \
#   --val_fraction=0.16 --out_dir=data/tinystories_selfbias_smoke
from pathlib import Path

exec(Path(__file__).with_name("tinystories_smoke.py").read_text())
out_dir = "out/tinystories_selfbias_smoke"
data = "data/tinystories_selfbias_smoke"
prepare = {"input": "tinystories", "tokenizer": "char", "min_chars": 16, "max_documents": 2_500, "val_fraction": 0.16}
planner_self_bias = 1.8
