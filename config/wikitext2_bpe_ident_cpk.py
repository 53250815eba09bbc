# The name is that of a file of APEL-R that was never public: the values are ours.
# Another kind of text: WikiText-2, version 1 with all its losses.
# Before: python prepare_data.py text --input=wikitext2 --vocab_size=4096 --out_dir=data/wikitext2
from pathlib import Path

exec(Path(__file__).with_name("tinystories_bpe_ident_iter.py").read_text())
out_dir = "out/wikitext2_bpe_ident_cpk"
data = "data/wikitext2"
chunk_post_kl_weight = 0.05
