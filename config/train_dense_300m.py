# a dense float model of 300,270,592 parameters (a tied matrix counted once), 105B tokens in 100,000 steps.
# its ternary twin: --ternary. data: prepare/fineweb_edu.py makes FineWeb's sample-100BT in GPT-2's tokens

dataset = "fineweb"
prepare = (
    "python prepare/fineweb_edu.py --repo=HuggingFaceFW/fineweb --config=sample-100BT --tokenizer=gpt2 "
    "--name=fineweb"
)
vocab_size = 50_257
vocab_multiple = 64  # 50,304 rows: a multiple that tensor cores like
seq_len = 2048
batch_size = 16
total_batch_size = 1_048_576  # tokens = 512 sequences: 32 micro-steps on one device, 4 on eight
max_steps = 100_000

n_layer = 24
n_head = 16
n_kv_head = 16
n_embd = 1024
ffn_dim = 2008  # of the multiples of 8, which bfloat16 products want, the nearest to 300M
dropout = 0.1
tie_embeddings = True
ternary = False

optimizer = "adamw"
schedule = "cosine"
warmup_steps = 2000
learning_rate = 6e-4
min_lr_ratio = 0.1
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-8
weight_decay = 0.1
grad_clip = 1.0

log_every = 10
eval_every = 1000
eval_tokens = 4_194_304
patience = 10  # evaluations: the run ends 10,000 steps after its best
sample_every = 5000
save_every = 10_000
sample_prompts = [
    "The capital of France is",
    "Water boils when",
    "Once upon a time",
    "In 1905, Albert Einstein",
]
