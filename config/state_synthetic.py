# Synthetic cells with known effects: what train_state.py does by itself. One cell type is never seen perturbed; the
# table at the end is about it.
# Before: python prepare_data.py state
out_dir = "out/state"
toml = "data/state/synthetic.toml"
embed_key = "X_hvg"
output_space = "gene"
