# The baseline with the optimizer that trained ternary models best in small comparisons (docs/results.md).
# It has not been trained at this size. The best rate falls with width and length, so the baseline's rates are
# kept: three layers of this width did best at 4.5e-3, after 1.2M tokens.

from config.train_baseline_95m import *  # noqa: F403

optimizer = "muon"
# five fresh seeds, 4.9M tokens, rate 8e-3: 0.013 +- 0.002 nats less than 0.95 at 0.77M parameters, and
# 0.029 +- 0.002 at 2.8M (after half the tokens 0.023 and 0.042); not tried at the rate of this config
muon_momentum = 0.9
