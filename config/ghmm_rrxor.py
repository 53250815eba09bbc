# RRXOR (two random bits, then their exclusive or): 36 beliefs that no single layer holds in full, because beliefs
# with the same next-token prediction may merge on the way out. The concatenation of all layers has them
# (Shai et al. 2024, arXiv:2405.15943). Two CPU cores: about 3 minutes.
out_dir = "out/ghmm_rrxor"
process = "rrxor"
p1 = 0.5
p2 = 0.5
n_ctx = 10
max_steps = 2_500
