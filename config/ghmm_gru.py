# Mess3 with a recurrent network: a GRU must carry the belief too, here in a hidden state instead of a residual stream.
out_dir = "out/ghmm_gru"
process = "mess3"
model = "gru"
n_layers = 2
d_model = 64
max_steps = 2_000
