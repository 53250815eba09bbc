# Synthetic cells with known effects (prepare_data.py state --action=synthetic): what train_state.py does by itself,
# some minutes on two CPU cores. One cell type is never seen perturbed; the table at the end is about it.
out_dir = "out/state"
toml = "data/state/synthetic.toml"
embed_key = "X_hvg"
output_space = "gene"
