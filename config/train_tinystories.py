# stories of a few hundred words that a small child would understand, 12M parameters (arXiv 2305.07759).
# data: python prepare/tinystories.py

dataset = "tinystories"
vocab_size = 4096  # a SentencePiece tokenizer trained on the stories
seq_len = 256
batch_size = 32
total_batch_size = 8192  # tokens = 32 x 256
max_steps = 60_000  # 491M tokens, about an epoch

n_layer = 6
n_head = 6
n_kv_head = 3
n_embd = 384
ffn_dim = 1152

learning_rate = 1.5e-3
stage2_lr_ratio = 2 / 3
warmup_steps = 375

log_every = 100
eval_every = 2000
sample_every = 2000
sample_tokens = 128
save_every = 5000
sample_prompts = ["Once upon a time", "The little dog was", "One day, a girl named Lily"]
