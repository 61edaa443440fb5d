# Additions, subtractions and products of numbers with one to three digits. 1.3M parameters.
# Its former size was never trained: 5M parameters (n_layer 6, n_embd 256, n_head 8, ffn_dim 768),
# 30,000 steps of 4,096 tokens.

dataset = "arithmetic3"
prepare = "python prepare/arithmetic.py --ops=+-x --digits=3 --train_problems=2000000 --name=arithmetic3"
vocab_size = 15  # one for each character of a problem
seq_len = 64
batch_size = 12
total_batch_size = 768  # tokens: 12 x 64
max_steps = 48_000

n_layer = 3
n_head = 6
n_kv_head = 6
n_embd = 192
ffn_dim = 512

learning_rate = 2e-3
stage2_lr_ratio = 0.65
min_lr_ratio = 0.0075
warmup_steps = 200
beta2 = 0.999  # a step has few tokens, so the squares of its gradient are noisy

eval_every = 4000
eval_tokens = 16384
sample_every = 4000
sample_tokens = 8
sample_prompts = ["12+34=", "123+456=", "345-678=", "12x34=", "7x8="]
save_every = 4000
