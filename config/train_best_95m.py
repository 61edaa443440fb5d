# The baseline with the optimizer that trained ternary models best in a small comparison (docs/results.md).
# It has not been trained at this size. In the comparison, twice the baseline's rates were better still.

from config.train_baseline_95m import *  # noqa: F403

optimizer = "muon"
