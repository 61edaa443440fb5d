# A mixture of 8 experts, 2 of them for each token: 505,965,312 parameters, 166,226,688 active. 10B tokens.
# --ternary makes the experts ternary.
# Data: python prepare/fineweb_edu.py (FineWeb-Edu in the LLaMA-2 tokenizer of 32,000 pieces)

dataset = "fineweb_edu"
vocab_size = 32_000
seq_len = 1024
total_batch_size = 524_288  # tokens: in large steps, the work of Muon itself is the smaller part
total_tokens = 10_000_000_000

n_layer = 12
n_head = 12
n_kv_head = 12
n_embd = 768
ffn_dim = 2048  # of each expert
n_expert = 8
n_expert_active = 2
ternary = False

# Muon for the matrices, one expert at a time; AdamW at the same rate for embedding, norms and routers
optimizer = "muon"
schedule = "cosine"
warmup_steps = 1000
learning_rate = 1e-3
min_lr_ratio = 0.1
log_every = 10
eval_every = 500
eval_tokens = 2_097_152
sample_every = 2000
save_every = 1000
sample_prompts = ["The capital of France is", "Water boils when", "Once upon a time"]
sample_prompts += ["In 1905, Albert Einstein"]
