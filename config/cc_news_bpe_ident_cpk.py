# The name is that of a file of APEL-R that was never public: the values are ours.
# News: are plans still found away from stories?
# Before: python prepare_data.py text --input=cc_news --vocab_size=8192 --out_dir=data/cc_news
from pathlib import Path

exec(Path(__file__).with_name("tinystories_bpe_ident_cpk_scale.py").read_text())
out_dir = "out/cc_news_bpe_ident_cpk"
data = "data/cc_news"
