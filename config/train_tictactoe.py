# Tic-tac-toe from random games, the result first: ask for a win, or for no loss. 12M parameters.
# Data: python prepare/tictactoe.py

dataset = "tictactoe"
vocab_size = 13  # the end of a line, X O D, the squares 1 to 9
seq_len = 64  # about six games
batch_size = 64
total_batch_size = 4096  # tokens: 64 x 64
max_steps = 20_000

n_layer = 4
n_head = 8
n_kv_head = 8
n_embd = 512
ffn_dim = 1280

warmup_steps = 200
eval_every = 2000
eval_tokens = 65536
sample_every = 2000
sample_tokens = 11
sample_prompts = ["X", "O", "D", "X5", "O15"]
save_every = 2000
