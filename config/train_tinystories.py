# Stories of a few hundred words that a small child would understand (arXiv 2305.07759). 12M parameters.
# Data: python prepare/tinystories.py

dataset = "tinystories"
vocab_size = 4096  # a SentencePiece tokenizer trained on the stories
batch_size = 32
total_batch_size = 8192  # tokens: 32 x 256
max_steps = 60_000  # 491M tokens, about an epoch

n_layer = 6
n_head = 6
n_kv_head = 3
n_embd = 384
ffn_dim = 1152

eval_every = 2000
sample_every = 2000
sample_tokens = 128
save_every = 5000
sample_prompts = ["Once upon a time", "The little dog was", "One day, a girl named Lily"]
