# One megabyte of your own text, about six minutes on two CPU cores: 0.9M parameters.

dataset = "shakespeare"
prepare = "python prepare/text.py --files=input.txt --vocab_size=1024 --name=shakespeare"
seq_len = 128  # about 300 characters
batch_size = 8
total_batch_size = 1024  # tokens: 8 x 128
max_steps = 1800  # 1.8M tokens: a megabyte of text four times

n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 128
ffn_dim = 384

optimizer = "muon"  # trains small ternary models best: docs/results.md
learning_rate = 8e-3
warmup_steps = 50
compile = False  # in a run this short, compiling takes longer than it saves
log_every = 50
eval_every = 200
eval_tokens = 0  # all of the held-out text
sample_every = 600
save_every = 600
