# Additions, subtractions and products of numbers with one to three digits. 1.3M parameters.
# Before: AdamW, 48,000 steps of 768 tokens, learning_rate 2e-3, beta2 0.999, 99.3 % of sums and differences.
# Before that, never trained: 5M parameters (n_layer 6, n_embd 256, n_head 8, ffn_dim 768), 30,000 steps of
# 4,096 tokens.

dataset = "arithmetic3"
prepare = "python prepare/arithmetic.py --ops=+-x --digits=3 --train_problems=2000000 --name=arithmetic3"
vocab_size = 15  # one for each character of a problem
seq_len = 64
batch_size = 32
total_batch_size = 2048  # tokens: 32 x 64
max_steps = 10_000

n_layer = 3
n_head = 6
n_kv_head = 6
n_embd = 192
ffn_dim = 512

optimizer = "muon"  # 99.6 to 99.8 % with half of AdamW's tokens: docs/results.md
learning_rate = 4e-3
stage2_lr_ratio = 0.65
min_lr_ratio = 0.0075
warmup_steps = 200

eval_every = 1000
eval_tokens = 16384
sample_every = 1000
sample_tokens = 8
sample_prompts = ["12+34=", "123+456=", "345-678=", "12x34=", "7x8="]
save_every = 1000
