# a ternary model that learns to add: under 1M parameters, minutes on two CPU cores.
# data: python prepare/arithmetic.py

dataset = "arithmetic"
vocab_size = 15  # the characters of an addition
seq_len = 64  # about eight problems
batch_size = 12
total_batch_size = 768  # tokens = 12 x 64
max_steps = 4000  # many small steps beat few large ones here

n_layer = 2
n_head = 4
n_kv_head = 4
n_embd = 128
ffn_dim = 512

learning_rate = 2e-3
stage2_lr_ratio = 0.65
min_lr_ratio = 0.0075
warmup_steps = 50

compile = False  # compiling takes longer than it saves in a run this short

log_every = 100
eval_every = 500
eval_tokens = 16384
sample_every = 500
sample_tokens = 8
sample_prompts = ["12+34=", "7+5=", "99+99=", "60+40=", "81+19="]
save_every = 500
