# State of July 2025 for Tahoe-100M, a chemical screen: the sizes of tahoe_llama_62089464.yaml. GPUs, by torchrun.
# The drugs stand in obs["drugname_drugconc"], their controls are of the same plate and DMSO.
out_dir = "out/state_tahoe"
pert_col = "drugname_drugconc"
cell_type_key = "cell_name"
batch_col = "plate"
control_pert = "[('DMSO_TF', 0.0, 'uM')]"
basal_mapping_strategy = "batch"
cell_set_len = 512
d_model = 696
n_layers = 8
n_heads = 12
d_head = 58
d_mlp = 2_784
n_encoder_layers = 4
n_decoder_layers = 4
lr = 1e-4
warmup_steps = 0
log_interval = 100
eval_interval = 2_000
optimizer = "adam"
schedule = "constant"
max_steps = 400_000
