# The name is that of a file of APEL-R that was never public: the values are ours.
# The same on WikiText-2.
# Before: python prepare_data.py text --input=wikitext2 --vocab_size=4096 --out_dir=data/wikitext2
from pathlib import Path

exec(Path(__file__).with_name("v2_fast.py").read_text())
out_dir = "out/v2_wikitext2_fast"
data = "data/wikitext2"
dropout = 0.3
max_steps = 2_000
preview_prompt = "The"
