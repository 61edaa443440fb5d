# A ternary model that learns to add: under 1M parameters, minutes on two CPU cores.
# Data: python prepare/arithmetic.py

dataset = "arithmetic"
vocab_size = 15  # one for each character of an addition
seq_len = 64  # about eight problems
batch_size = 12
total_batch_size = 768  # tokens: 12 x 64
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
compile = False  # in a run this short, compiling takes longer than it saves
eval_every = 500
eval_tokens = 16384
sample_every = 500
sample_tokens = 8
sample_prompts = ["12+34=", "7+5=", "99+99=", "60+40=", "81+19="]
save_every = 500
