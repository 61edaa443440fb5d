# The baseline with the optimizer that trained ternary models best in a small comparison (docs/results.md).
# It has not been trained at this size. In the comparison, twice the baseline's rates were better still.

from config.train_baseline_95m import *  # noqa: F403

optimizer = "muon"
# fresh seeds, 2.5M tokens, rate 8e-3: 0.023 +- 0.006 nats less than 0.95 at 0.77M parameters, 0.042 +- 0.001
# at 2.8M; not tried at the rate of this config
muon_momentum = 0.9
