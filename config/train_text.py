# Your own text: 10M parameters in the blocks, and 384 for each token of the vocabulary.

dataset = "text"
prepare = "python prepare/text.py --files='*.txt'"
batch_size = 32
total_batch_size = 8192  # tokens: 32 x 256
max_steps = 5000  # 41M tokens; more than ten times the tokens of the text is only repetition

n_layer = 6
n_head = 6
n_kv_head = 3
n_embd = 384
ffn_dim = 1152
dropout = 0.1  # for small texts, which are read many times

warmup_steps = 200
log_every = 50
eval_every = 500
sample_every = 500
sample_tokens = 128
save_every = 1000
patience = 5  # stop when the validation loss has not fallen for 2,500 steps
