# Tic-tac-toe from random games, the result first: ask for a win, or for no loss. 1.3M parameters.
# Data: python prepare/tictactoe.py
# Its former size was never trained: 12M parameters (n_layer 4, n_embd 512, n_head 8, ffn_dim 1280),
# 20,000 steps of 4,096 tokens.

dataset = "tictactoe"
vocab_size = 13  # the end of a line, X O D, the squares 1 to 9
seq_len = 64  # about six games
batch_size = 16
total_batch_size = 1024  # tokens: 16 x 64
max_steps = 30_000

n_layer = 3
n_head = 6
n_kv_head = 6
n_embd = 192
ffn_dim = 512

warmup_steps = 200
beta2 = 0.999  # a step has few tokens, so the squares of its gradient are noisy

eval_every = 3000
eval_tokens = 65536
sample_every = 3000
sample_tokens = 11
sample_prompts = ["X", "O", "D", "X5", "O15"]
save_every = 3000
