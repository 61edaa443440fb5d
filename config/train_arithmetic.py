# Additions, subtractions and products of numbers with one to three digits. 5M parameters.

dataset = "arithmetic3"
prepare = "python prepare/arithmetic.py --ops=+-x --digits=3 --train_problems=2000000 --name=arithmetic3"
vocab_size = 15  # one for each character of a problem
seq_len = 128
batch_size = 32
total_batch_size = 4096  # tokens: 32 x 128
max_steps = 30_000

n_layer = 6
n_head = 8
n_kv_head = 8
n_embd = 256
ffn_dim = 768

learning_rate = 2e-3
stage2_lr_ratio = 0.65
min_lr_ratio = 0.0075
warmup_steps = 200

eval_every = 2500
eval_tokens = 16384
sample_every = 2500
sample_tokens = 8
sample_prompts = ["12+34=", "123+456=", "345-678=", "12x34=", "7x8="]
save_every = 2500
