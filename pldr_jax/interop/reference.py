"""The model once more, in NumPy and float64, by the names of the transformers layout.

It shares no code with `pldr_jax/model` and knows nothing of our parameter tree: what a conversion
put in the wrong place, turned or rotated wrongly changes the logits of one of the two.
"""

from collections.abc import Mapping

import numpy as np

from pldr_jax.config import ModelConfig

Array = np.ndarray


def reference_logits(
    config: ModelConfig, tensors: Mapping[str, Array], tokens_T: Array, g_lm_LNHJ: Array | None
) -> Array:
    """Logits [T,V], float64, of one sequence; see `reference_outputs`."""
    return reference_outputs(config, tensors, tokens_T, g_lm_LNHJ)[0]


def reference_outputs(
    config: ModelConfig, tensors: Mapping[str, Array], tokens_T: Array, g_lm_LNHJ: Array | None
) -> tuple[Array, dict[str, Array]]:
    """Logits [T,V] of one sequence, and its deductive outputs A, A_LM, A_P and G_LM [L,N,H,J] by
    their names, all float64; only G_LM where it is not learned.

    Args:
      tensors: by their names, any float dtype.
      g_lm_LNHJ: predefined G_LM; None is the learned one, or the identity.
    """

    def get(name: str) -> Array:
        return np.asarray(tensors[name], np.float64)

    def linear(name: str, x: Array) -> Array:
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(name: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
        return scaled * get(f"{name}.weight") + get(f"{name}.bias")

    def glu(name: str, x: Array) -> Array:
        gate = linear(f"{name}.gluw1", x)
        return linear(f"{name}.gluw3", gate * _sigmoid(gate) * linear(f"{name}.gluw2", x))

    def deductive(name: str, q_NTH: Array) -> dict[str, Array]:
        a_NHJ = norm(f"{name}.layernorm1", np.swapaxes(q_NTH, 1, 2) @ q_NTH)
        for r in range(config.num_residual_layers):
            x = a_NHJ
            for u in range(config.num_gated_units):
                x = glu(f"{name}.reslayerAs.{r}.denseAs.{u}", x)
            a_NHJ = norm(f"{name}.reslayerAs.{r}.layernormA", a_NHJ + x)
        plga = f"{name}.plgatt_layer"
        x = get(f"{plga}.Wlst") @ a_NHJ + get(f"{plga}.blst")
        a_lm = x * x * _sigmoid(x) + 1e-9
        a_p = a_lm ** get(f"{plga}.pwlst")
        g_lm = get(f"{plga}.alst") @ a_p + get(f"{plga}.balst")
        return {"A": a_NHJ, "A_LM": a_lm, "A_P": a_p, "G_LM": g_lm}

    eps, heads, width = config.layer_norm_eps, config.num_heads, config.head_dim
    length = len(tokens_T)
    future_TT = np.triu(np.ones((length, length), bool), 1)
    x_TD = get("decoder.embedding.weight")[tokens_T] * np.sqrt(config.model_dim)
    x_TD = norm("decoder.layernorm1", x_TD)
    layers: list[dict[str, Array]] = []
    for i in range(config.num_layers):
        layer, attention = f"decoder.dec_layers.{i}", f"decoder.dec_layers.{i}.mha1"
        q_NTH, k_NTH, v_NTH = (
            linear(f"{attention}.{name}", x_TD).reshape(length, heads, width).swapaxes(0, 1)
            for name in ("wq", "wk", "wv")
        )
        q_NTH, k_NTH = _rotate(config, q_NTH), _rotate(config, k_NTH)
        if g_lm_LNHJ is not None:
            layers.append({"G_LM": np.asarray(g_lm_LNHJ[i], np.float64)})
        elif config.g_source == "identity":
            layers.append({"G_LM": np.broadcast_to(np.eye(width), (heads, width, width))})
        else:
            layers.append(deductive(attention, q_NTH))
        scores_NTT = q_NTH @ layers[-1]["G_LM"] @ k_NTH.swapaxes(1, 2) / np.sqrt(width)
        scores_NTT = np.where(future_TT, -np.inf, scores_NTT)
        weights_NTT = np.exp(scores_NTT - scores_NTT.max(-1, keepdims=True))
        weights_NTT /= weights_NTT.sum(-1, keepdims=True)
        mixed_TD = (weights_NTT @ v_NTH).swapaxes(0, 1).reshape(length, -1)
        x_TD = norm(f"{layer}.layernorm1", x_TD + linear(f"{attention}.dense", mixed_TD))
        x_TD = norm(f"{layer}.layernorm2", x_TD + glu(f"{layer}.ffn", x_TD))
    outputs = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    return linear("final_layer", x_TD), outputs


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _rotate(config: ModelConfig, x_NTH: Array) -> Array:
    """Rotary embedding at positions 0 .. T-1; pairs as complex numbers."""
    half = config.head_dim // 2
    angle_T1 = np.arange(x_NTH.shape[1])[:, None]
    turn = np.exp(1j * angle_T1 * config.rope_theta ** (-np.arange(half) / half))
    if config.rope_layout == "interleaved":
        z = (x_NTH[..., 0::2] + 1j * x_NTH[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x_NTH.shape)
    z = (x_NTH[..., :half] + 1j * x_NTH[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)
