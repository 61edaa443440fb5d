# a mixture of 8 experts, 2 of them for each token: 505,965,312 parameters, 166,226,688 active. 10B tokens.
# ternary experts: --ternary. data: python prepare/fineweb_edu.py (FineWeb-Edu, LLaMA-2's 32,000 tokens)

dataset = "fineweb_edu"
vocab_size = 32_000
seq_len = 1024
batch_size = 16
total_batch_size = 524_288  # tokens: Muon's own work is the smaller part only in large steps
total_tokens = 10_000_000_000

n_layer = 12
n_head = 12
n_kv_head = 12
n_embd = 768
ffn_dim = 2048  # of each expert
n_expert = 8
n_expert_active = 2
router_balance = 0.01
router_z = 0.001
tie_embeddings = True
ternary = False

optimizer = "muon"  # the matrices, each expert's by itself; AdamW at the same rate: embedding, norms, routers
schedule = "cosine"
warmup_steps = 1000
learning_rate = 1e-3
min_lr_ratio = 0.1
weight_decay = 0.1
grad_clip = 1.0

log_every = 10
eval_every = 500
eval_tokens = 2_097_152
sample_every = 2000
save_every = 1000
keep_last = 3
sample_prompts = [
    "The capital of France is",
    "Water boils when",
    "Once upon a time",
    "In 1905, Albert Einstein",
]
