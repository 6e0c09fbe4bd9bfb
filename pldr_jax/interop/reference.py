"""The model once more, in NumPy and float64, by the names of the transformers layout.

It shares no code with `pldr_jax/model` and knows nothing of our parameter tree: what a conversion
put in the wrong place, turned or rotated wrongly changes the logits of one of the two.
"""

from collections.abc import Mapping

import numpy as np

from pldr_jax.config import ModelConfig


def reference_logits(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    tokens_T: np.ndarray,
    g_lm_LNHJ: np.ndarray | None,
) -> np.ndarray:
    """Logits [T,V], float64, of one sequence; see `reference_outputs`."""
    return reference_outputs(config, tensors, tokens_T, g_lm_LNHJ)[0]


def reference_outputs(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    tokens_T: np.ndarray,
    g_lm_LNHJ: np.ndarray | None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [T,V] of one sequence, and its deductive outputs A, A_LM, A_P and G_LM [L,N,H,J] by
    their names, all float64; only G_LM where it is not learned.

    Args:
      tensors: by their names, any float dtype.
      g_lm_LNHJ: predefined G_LM; None is the learned one, or the identity.
    """
    net, width = _Layers(config, tensors), config.head_dim
    x_TD = net.get("decoder.embedding.weight")[tokens_T] * np.sqrt(config.model_dim)
    x_TD = net.norm("decoder.layernorm1", x_TD)
    layers: list[dict[str, np.ndarray]] = []
    for i in range(config.num_layers):
        layer, attention = f"decoder.dec_layers.{i}", f"decoder.dec_layers.{i}.mha1"
        q_NTH, k_NTH, v_NTH = (
            net.heads(f"{attention}.{name}", x_TD) for name in ("wq", "wk", "wv")
        )
        q_NTH, k_NTH = _rotate(config, q_NTH), _rotate(config, k_NTH)
        if g_lm_LNHJ is not None:
            layers.append({"G_LM": np.asarray(g_lm_LNHJ[i], np.float64)})
        elif config.g_source == "identity":
            layers.append(
                {"G_LM": np.broadcast_to(np.eye(width), (config.num_heads, width, width))}
            )
        else:
            layers.append(net.deductive(attention, q_NTH))
        mixed_TD = _attend(q_NTH @ layers[-1]["G_LM"], k_NTH, v_NTH)
        x_TD = net.norm(f"{layer}.layernorm1", x_TD + net.linear(f"{attention}.dense", mixed_TD))
        x_TD = net.norm(f"{layer}.layernorm2", x_TD + net.glu(f"{layer}.ffn", x_TD))
    outputs = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    head = next(x for x in ("final_layer", "score", "qa_outputs") if f"{x}.weight" in tensors)
    if f"{head}.bias" not in tensors:  # that of sequences has none
        return x_TD @ net.get(f"{head}.weight").T, outputs
    return net.linear(head, x_TD), outputs


class _Layers:
    """The layers of the model, by the names of their tensors."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
        self._config, self._tensors = config, tensors

    def get(self, name: str) -> np.ndarray:
        return np.asarray(self._tensors[name], np.float64)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.get(f"{name}.weight").T + self.get(f"{name}.bias")

    def heads(self, name: str, x_TD: np.ndarray) -> np.ndarray:
        """A projection, split into heads [N,T,H]."""
        shape = (len(x_TD), self._config.num_heads, self._config.head_dim)
        return self.linear(name, x_TD).reshape(shape).swapaxes(0, 1)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        variance = np.square(centred).mean(-1, keepdims=True)
        scaled = centred / np.sqrt(variance + self._config.layer_norm_eps)
        return scaled * self.get(f"{name}.weight") + self.get(f"{name}.bias")

    def glu(self, name: str, x: np.ndarray) -> np.ndarray:
        gate = self.linear(f"{name}.gluw1", x)
        hidden = gate * _sigmoid(gate) * self.linear(f"{name}.gluw2", x)
        return self.linear(f"{name}.gluw3", hidden)

    def deductive(self, name: str, q_NTH: np.ndarray) -> dict[str, np.ndarray]:
        a_NHJ = self.norm(f"{name}.layernorm1", np.swapaxes(q_NTH, 1, 2) @ q_NTH)
        for r in range(self._config.num_residual_layers):
            x = a_NHJ
            for u in range(self._config.num_gated_units):
                x = self.glu(f"{name}.reslayerAs.{r}.denseAs.{u}", x)
            a_NHJ = self.norm(f"{name}.reslayerAs.{r}.layernormA", a_NHJ + x)
        plga = f"{name}.plgatt_layer"
        x = self.get(f"{plga}.Wlst") @ a_NHJ + self.get(f"{plga}.blst")
        a_lm = x * x * _sigmoid(x) + 1e-9
        a_p = a_lm ** self.get(f"{plga}.pwlst")
        g_lm = self.get(f"{plga}.alst") @ a_p + self.get(f"{plga}.balst")
        return {"A": a_NHJ, "A_LM": a_lm, "A_P": a_p, "G_LM": g_lm}


def _attend(q_NTH: np.ndarray, k_NTH: np.ndarray, v_NTH: np.ndarray) -> np.ndarray:
    """Causal softmax attention, its heads joined [T,D]."""
    length, width = q_NTH.shape[1:]
    scores_NTT = q_NTH @ k_NTH.swapaxes(1, 2) / np.sqrt(width)
    scores_NTT = np.where(np.triu(np.ones((length, length), bool), 1), -np.inf, scores_NTT)
    weights_NTT = np.exp(scores_NTT - scores_NTT.max(-1, keepdims=True))
    weights_NTT /= weights_NTT.sum(-1, keepdims=True)
    return (weights_NTT @ v_NTH).swapaxes(0, 1).reshape(length, -1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _rotate(config: ModelConfig, x_NTH: np.ndarray) -> np.ndarray:
    """Rotary embedding at positions 0 .. T-1; pairs as complex numbers."""
    half = config.head_dim // 2
    angle_T1 = np.arange(x_NTH.shape[1])[:, None]
    turn = np.exp(1j * angle_T1 * config.rope_theta ** (-np.arange(half) / half))
    if config.rope_layout == "interleaved":
        z = (x_NTH[..., 0::2] + 1j * x_NTH[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x_NTH.shape)
    z = (x_NTH[..., :half] + 1j * x_NTH[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)
