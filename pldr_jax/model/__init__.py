"""The network: pure Flax Linen modules, the deductive outputs and the cache.

The legend of shape letters, used in names (`q_BTNH`) and in einsum strings everywhere in the
project:

    B batch · T tokens (queries) · S tokens attended to (keys, cache slots) · L decoder layers · N
    heads · H head dimension · J the second head-dimension axis of W, P, a, A and G_LM · D model
    width, N * H · F feed-forward width · M metric-learner width · R residual layers · U gated units
    in one of them · V vocabulary · K segments in a row · E rank of a head of a
    low-rank G_LM
"""
