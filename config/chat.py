# A model that answers: trained on the conversations of prepare/chat.py, from a run whose shape it takes.
# python train.py config/chat.py --init_from=runs/train_text

dataset = "chat"
prepare = "python prepare/chat.py --files='talks/*.jsonl' --ckpt=runs/train_text"
batch_size = 32  # 8,192 tokens a step in a context of 256, of which about half are learned
max_steps = 1000  # three epochs of 20,000 conversations, or of 2.7M tokens; more is mostly repetition

learning_rate = 4.5e-3  # the best of four on a model of 2.4M parameters, see docs/results.md
schedule = "linear"
warmup_steps = 50
weight_decay = 0.0
dropout = 0.1  # for few conversations, which are read several times

log_every = 20
eval_every = 100
eval_tokens = 0  # all
sample_every = 500
sample_prompts = ["User: Hello!\nAssistant:", "User: What is a cat?\nAssistant:"]
save_every = 500
patience = 3  # stop when the loss on held-out answers has not fallen for 300 steps; runs/chat/best is kept
