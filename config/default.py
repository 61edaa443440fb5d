# Every setting, its default and its unit. A config file overrides what it needs, --key=value overrides both.
# A path is relative to the current folder. '' and 0 mean off if the comment says so.

# run
run_id = ""  # name of the run's folder; '' = the name of the config file
out_dir = "runs"  # folder of all runs
seed = 1337  # seed of the initial weights, the data order and dropout; another seed is another run
resume = ""  # '' = new run | auto = newest checkpoint, if any | a run folder, step folder or checkpoint.pt
init_from = ""  # '' = random | take the weights of a run, step folder, checkpoint.pt or Hugging Face Llama

# data
dataset = "arithmetic"  # name of the folder in data_dir, written by prepare/<name>.py
data_dir = "data"  # folder of all data sets
prepare = ""  # command that writes the data set, shown if it is missing; '' = python prepare/<dataset>.py
tokenize_on_fly = False  # train while the data set is being written; validate on its first windows
verify_data = False  # read all shards again and compare their sha256, even if size and time are the same
batch_size = 16  # sequences per device and micro-step; if memory runs out, halve it and set total_batch_size
seq_len = 256  # tokens per sequence: the longest context of the model
total_batch_size = 0  # tokens (not sequences) per optimizer step over all devices; 0 = one micro-step

# length
max_steps = 0  # optimizer steps; 0 = computed from total_tokens
total_tokens = 0  # tokens to train on; 0 = computed from max_steps
max_minutes = 0.0  # minutes since training began in this process, then the run ends as if finished; 0 = off

# model
n_layer = 8  # transformer blocks
n_head = 12  # query heads; the head size is n_embd / n_head
n_kv_head = 6  # key and value heads, each shared by n_head / n_kv_head query heads
n_embd = 768  # width of the model
ffn_dim = 3072  # inner width of the feed-forward network
vocab_size = 0  # number of token ids; 0 = that of the data set
rope_theta = 10000.0  # base of the rotary position embedding
norm_eps = 1e-5  # added to the mean square in RMSNorm
dropout = 0.0  # probability of dropping an activation while training
tie_embeddings = True  # the head uses the matrix of the embedding
vocab_multiple = 1  # round embedding and head up to a multiple of this many rows; extra rows are never used
ternary = True  # BitNet b1.58; False = the float twin: the same shape, data order and schedule
n_expert = 0  # experts per block, each of inner width ffn_dim; 0 = an ordinary feed-forward network
n_expert_active = 2  # experts for each token; 1 = weighted as in Switch, more = as in Mixtral
router_balance = 0.01  # weight of the load-balancing loss (1 = balanced), averaged over blocks
router_z = 0.001  # weight of the z-loss, which keeps router logits small, averaged over blocks

# optimizer
optimizer = "adamw"  # adamw | muon: for the matrices of the blocks; all else uses AdamW at the same rate
learning_rate = 1.5e-3  # peak, at the end of the warm-up; the whole schedule scales with it
beta1 = 0.9  # AdamW: decay of the running mean of the gradient
beta2 = 0.95  # AdamW: decay of the running mean of the squared gradient
adam_eps = 1e-8  # AdamW: added to the root of that second mean
muon_momentum = 0.95  # Muon: decay of the running mean of the gradient
weight_decay = 0.1  # of the matrices in the blocks; norms, embedding and head have none
grad_clip = 1.0  # clip the gradient to this norm; 0 = off

# schedule
schedule = "two_stage"  # two_stage | bitnet | wsd | cosine | linear | constant
warmup_steps = 375  # steps of linear warm-up; may be more than max_steps
stage_boundary = 0.5  # two_stage, bitnet: beginning of stage 2, as a fraction of max_steps
stage2_lr_ratio = 2 / 3  # two_stage, bitnet: rate at the beginning of stage 2, as a fraction of learning_rate
stage2_weight_decay = 0.0  # two_stage, bitnet: weight decay of stage 2
decay_fraction = 0.33  # wsd: last part of the run, in which the rate falls, as a fraction of max_steps
min_lr_ratio = 0.01  # rate at max_steps, as a fraction of learning_rate

# machine
device = "auto"  # auto | cpu | cuda | cuda:1 | mps
dtype = "auto"  # auto | float32 | bfloat16 | float16: of the matrix products; weights stay float32
compile = True  # use torch.compile; switched off, with the reason, if it cannot run
cuda_graph = True  # on one CUDA card, start the kernels of a small micro-step or of a new token together
fsdp = False  # torchrun: split every parameter over the devices, for models that do not fit in one
deterministic = True  # repeat a run, and resume it, bit for bit on the same machine and torch

# what is logged, and how often (in steps; 0 = off)
log_every = 100  # a line of loss, rates and speed, and one of ternary health; at least 1
eval_every = 5000  # loss on the validation set; also at step 0 and at the end
eval_tokens = 262144  # validation tokens per evaluation at most, always the same ones; 0 = all
sample_every = 5000  # generated text for each prompt: greedy, top-k and nucleus; also at the end
sample_tokens = 64  # new tokens per sample
sample_prompts = ["\n"]  # prompts of the samples
save_every = 10000  # checkpoints; always one at the end, and at the stage boundary
keep_last = 3  # newest checkpoints that stay resumable, besides the best and the stage boundary's; 0 = all
patience = 0  # evaluations without a new best after which the run ends; 0 = off

# trackers: copies of the metrics; one that fails is switched off with a warning
tensorboard = False  # event files in runs/<run_id>/tensorboard
wandb = False  # Weights & Biases; log in first, or set the environment variable WANDB_MODE=offline
trackio = False  # Trackio, a local dashboard
wandb_project = "nanobit"  # project name in W&B and Trackio
wandb_entity = ""  # user or team in W&B; '' = the user who is logged in
wandb_name = ""  # run name in W&B and Trackio; '' = run_id
