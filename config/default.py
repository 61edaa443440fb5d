# every setting, its default and its unit. a config file overrides what it needs, --key=value overrides both.
# a path is relative to the folder the command runs in; '', 0 and 0.0 mean off where the comment says so.

# run
run_id = ""  # name of the run's folder; '' = the name of the config file
out_dir = "runs"  # folder of all runs
seed = 1337  # initial weights, order of the data, dropout; another seed is another run
resume = ""  # '' = a new run | auto = newest checkpoint, if any | a run folder, step folder or checkpoint.pt
init_from = ""  # '' = random weights | a run, step folder, checkpoint.pt or Hugging Face Llama: its weights

# data
dataset = "arithmetic"  # name of the folder in data_dir, made by prepare/<name>.py
data_dir = "data"  # folder of all data sets
prepare = ""  # the command that makes it, shown where it is missing; '' = python prepare/<dataset>.py
tokenize_on_fly = False  # train while the data set is being written; validates on its first val windows
verify_data = False  # read every shard again and compare its sha256, also if its size and time are the same
batch_size = 16  # sequences per device and micro-step; halve it if out of memory: total_batch_size stays
seq_len = 256  # tokens per sequence, the longest context of the model
total_batch_size = 0  # TOKENS per optimizer step, over all devices and micro-steps; 0 = one micro-step

# length
max_steps = 0  # optimizer steps; 0 = from total_tokens
total_tokens = 0  # tokens; 0 = from max_steps
max_minutes = 0.0  # minutes of training in one go; then the run ends as if finished. 0 = off

# model
n_layer = 8  # transformer blocks
n_head = 12  # query heads; the head size is n_embd / n_head
n_kv_head = 6  # key and value heads, each shared by n_head / n_kv_head query heads
n_embd = 768  # width
ffn_dim = 3072  # inner width of the feed-forward network
vocab_size = 0  # token ids; 0 = the data set's
rope_theta = 10000.0  # base of the rotary positions
norm_eps = 1e-5  # added to the mean square in RMSNorm
dropout = 0.0  # probability of dropping an activation while training
tie_embeddings = True  # the head shares the embedding's matrix
vocab_multiple = 1  # embedding and head get a multiple of so many rows; those over vocab_size are not used
ternary = True  # BitNet b1.58; False trains the float twin: the same shape, data order and schedule
n_expert = 0  # 0 = an ordinary feed-forward network | experts per block, each of inner width ffn_dim
n_expert_active = 2  # experts that a token goes through; with 1 weighted as in Switch, else as in Mixtral
router_balance = 0.01  # weight in the loss of the routers' unevenness (1 = even), mean over blocks
router_z = 0.001  # weight in the loss of the size of the routers' logits, mean over blocks

# optimizer
optimizer = "adamw"  # adamw | muon: for the matrices of the blocks; the rest has AdamW at the same rate
learning_rate = 1.5e-3  # peak, reached at the end of the warm-up; the whole schedule scales with it
beta1 = 0.9  # decay of the gradient's running mean
beta2 = 0.95  # decay of its running square
adam_eps = 1e-8  # added to the root of the running square
muon_momentum = 0.95  # muon: decay of the gradient's running mean
weight_decay = 0.1  # of the matrices in the blocks; norms, embedding and head have none
grad_clip = 1.0  # largest norm of the gradient; 0 = off

# schedule
schedule = "two_stage"  # two_stage | bitnet | wsd | cosine | linear | constant
warmup_steps = 375  # steps of linear warm-up; may exceed max_steps
stage_boundary = 0.5  # two_stage, bitnet: where stage 2 begins, as a fraction of max_steps
stage2_lr_ratio = 2 / 3  # two_stage, bitnet: rate where stage 2 begins, as a fraction of learning_rate
stage2_weight_decay = 0.0  # two_stage, bitnet: weight decay of stage 2
decay_fraction = 0.33  # wsd: the last part of the run, in which the learning rate falls to its final value
min_lr_ratio = 0.01  # rate at max_steps, as a fraction of learning_rate

# machine
device = "auto"  # auto | cpu | cuda | cuda:1 | mps
dtype = "auto"  # auto | float32 | bfloat16 | float16: of the matrix products; weights stay float32
compile = True  # torch.compile; switched off, with the reason, where it cannot run
fsdp = False  # under torchrun: each device holds a part of every parameter, for models that do not fit in one
deterministic = True  # bit for bit the same run, and exact resume, on the same machine and torch

# what is logged, and how often (in steps; 0 = off)
log_every = 100  # a line of losses, rates and speed, and one of ternary health; at least 1
eval_every = 5000  # loss on the validation set; also at step 0 and at the end
eval_tokens = 262144  # validation tokens per evaluation, at most, always the same; 0 = all
sample_every = 5000  # generated text: each prompt greedy, top-k and nucleus; also at the end
sample_tokens = 64  # new tokens per sample
sample_prompts = ["\n"]  # prompts of the samples
save_every = 10000  # checkpoints; one at the end and, in two stages, at the boundary come anyway
keep_last = 3  # checkpoints to keep resumable, beside best and boundary; weights are kept of all. 0 = all
patience = 0  # evaluations without a new best before the run ends; 0 = off

# trackers: mirrors of the metrics; one that fails is switched off with a warning
tensorboard = False  # event files in runs/<run_id>/tensorboard
wandb = False  # Weights & Biases; log in before, or set the environment variable WANDB_MODE=offline
trackio = False  # trackio, a local dashboard
wandb_project = "nanobit"  # project of W&B and trackio
wandb_entity = ""  # user or team of W&B; '' = the one that is logged in
wandb_name = ""  # name of the run in W&B and trackio; '' = run_id
