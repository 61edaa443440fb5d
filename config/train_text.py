# Your own text, an hour or more on one CPU core. 10M parameters in the blocks, and 384 for each token.

dataset = "text"
prepare = "python prepare/text.py --files='books/*.txt'"
batch_size = 16
total_batch_size = 4096  # tokens: 16 x 256
max_steps = 1000  # 4.1M tokens; a megabyte of text gains no more after 500 steps

n_layer = 6
n_head = 6
n_kv_head = 3
n_embd = 384
ffn_dim = 1152
dropout = 0.1  # for small texts, which are read many times

optimizer = "muon"  # trains small ternary models best: docs/results.md
muon_momentum = 0.9
learning_rate = 4e-3  # about what smaller models and shorter runs suggest; not tuned at this size
warmup_steps = 50
log_every = 10
eval_every = 100
sample_every = 250
sample_tokens = 128
save_every = 250
patience = 5  # stop when the validation loss has not fallen for 500 steps
