# A dense float model of 300,270,592 parameters (a tied matrix counted once), 105B tokens in 100,000 steps.
# --ternary trains its ternary twin. The command below makes its data: FineWeb sample-100BT in GPT-2 tokens.

dataset = "fineweb"
prepare = "python prepare/fineweb_edu.py --name=fineweb --tokenizer=gpt2 "
prepare += "--repo=HuggingFaceFW/fineweb --config=sample-100BT"
vocab_size = 50_257
vocab_multiple = 64  # 50,304 rows, a size that suits tensor cores
seq_len = 2048
total_batch_size = 1_048_576  # tokens: 512 sequences, 32 micro-steps on one device, 4 on eight
max_steps = 100_000

n_layer = 24
n_head = 16
n_kv_head = 16
n_embd = 1024
ffn_dim = 2008  # the multiple of 8 (for bfloat16 products) that comes closest to 300M parameters
dropout = 0.1
ternary = False

schedule = "cosine"
warmup_steps = 2000
learning_rate = 6e-4
min_lr_ratio = 0.1
log_every = 10
eval_every = 1000
eval_tokens = 4_194_304
patience = 10  # evaluations: the run ends 10,000 steps after the best one
sample_prompts = ["The capital of France is", "Water boils when", "Once upon a time"]
sample_prompts += ["In 1905, Albert Einstein"]
