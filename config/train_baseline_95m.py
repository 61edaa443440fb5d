# The ternary baseline: 95,367,936 parameters, of which 70,778,880 are ternary, 3.28B tokens in 400,000 steps.
# It states defaults too, so that the recipe does not move with them.
# Data: python prepare/fineweb_edu.py (FineWeb-Edu in the LLaMA-2 tokenizer of 32,000 pieces)

dataset = "fineweb_edu"
vocab_size = 32000
seq_len = 256
batch_size = 16
total_batch_size = 8192  # tokens: 2 micro-steps x 16 x 256
max_steps = 400_000

n_layer = 8
n_head = 12
n_kv_head = 6
n_embd = 768
ffn_dim = 3072
tie_embeddings = True

# 1.5e-3 to 1e-3 with weight decay, then 1e-3 to 1.5e-5 without
schedule = "two_stage"
warmup_steps = 375
learning_rate = 1.5e-3
weight_decay = 0.1
stage_boundary = 0.5  # step 200,000
stage2_lr_ratio = 2 / 3
stage2_weight_decay = 0.0
min_lr_ratio = 0.01
beta1 = 0.9
beta2 = 0.95

log_every = 100
eval_every = 5000
sample_every = 5000
save_every = 10_000  # also at 199,999 and 200,000
sample_prompts = ["The capital of France is", "Water boils when", "Once upon a time"]
sample_prompts += ["The most important thing about mathematics is", "In 1905, Albert Einstein"]
