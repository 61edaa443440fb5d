# The baseline with the optimizer that trained ternary models best in a small comparison (docs/results.md).
# It has not been trained at this size. In the comparison, twice the baseline's rates were better still. There
# muon_momentum 0.9 gained 0.023 +- 0.006 nats on four fresh seeds of 0.77M parameters; alone it was not tried
# on a larger model.

from config.train_baseline_95m import *  # noqa: F403

optimizer = "muon"
