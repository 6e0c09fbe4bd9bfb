"""The network: pure Flax Linen modules, the deductive outputs and the cache.

The legend of shape letters, used in names (`q_BTNH`) and in einsum strings everywhere in the
project; no letter has two meanings:

    B  batch: rows of one call (a training batch, prompts decoded side by side)
    Q  prompts that enter their slots in one call
    T  tokens (queries)
    S  tokens attended to, or the capacity of a cache
    L  decoder layers
    N  heads
    H  head dimension
    J  second head-dimension axis of W, P, a, A and G_LM
    I  head-dimension axis that a product sums over
    D  model width, N * H
    F  feed-forward width
    M  metric-learner width
    R  residual layers of the metric learner
    U  gated units in a residual layer
    V  vocabulary
    Y  labels of a task
    K  segments in a packed row
    E  rank of a head of a low-rank G_LM
    C  tokens of a row of data, T + 1
    G  microbatches of a step
    P  positions of a prefix
    X  decode steps of one call
    Y  most probable tokens that are told of a position
    Z  stop ids
"""
