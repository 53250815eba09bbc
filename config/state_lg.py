# State, large: the sizes of the source's state_lg.yaml and tahoe_llama_212693232.yaml. Several GPUs, by torchrun.
out_dir = "out/state_lg"
cell_set_len = 512
d_model = 1_488
n_layers = 6
n_heads = 12
d_head = 124
d_mlp = 5_952
n_encoder_layers = 4
n_decoder_layers = 4
use_basal_projection = False
lr = 1e-4
warmup_steps = 0
log_interval = 100
eval_interval = 2_000
optimizer = "adam"
schedule = "constant"
max_steps = 400_000
