"""The decoder: embedding, scanned decoder layers, head; and one layer at a time for decoding."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pldr_jax.config import ModelConfig
from pldr_jax.model.attention import Attention, AttentionInputs
from pldr_jax.model.cache import Cache, LayerCache, LayerOutputs
from pldr_jax.model.deductive import DeductiveOutputs, g_lm_shape
from pldr_jax.model.embedding import Embedding
from pldr_jax.model.layers import (
    GLU,
    REFERENCE_DIM,
    REFERENCE_FFN,
    Linear,
    layer_norm,
    width_scale,
)
from pldr_jax.model.segments import Segments
from pldr_jax.model.weights import scan_layers
from pldr_jax.model.weights import unstack_layers as unstack_layers
from pldr_jax.partition import Names, constrain, divided, in_use, save_all_but_gathered

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")
Params: TypeAlias = Any
"""A tree of float32 arrays; what is below `layers` is stacked over decoder layers. The forward pass
takes what `unstack_layers` makes of it as well.
"""

REMAT_POLICIES = {
    "none": save_all_but_gathered,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class ModelOutputs(flax.struct.PyTreeNode):
    """What a forward pass returns.

    Attributes:
      logits: inductive output [B,T,V], float32; None where the parameters have no `head`.
      deductive: A, A_LM, A_P, G_LM, [L,B,N,H,J] each; of rows with segments [L,B * K,N,H,J].
      hidden: states before the head [B,T,D].
      layers: keys and values [L,B,T,N,H], from which a cache is built.
    """

    logits: jax.Array
    deductive: DeductiveOutputs
    hidden: jax.Array
    layers: LayerOutputs


class DecoderLayer(nn.Module):
    """Post-norm layer: `LayerNorm(x + attention(x))`, then `LayerNorm(x + GLU(x))`."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        self.attention = Attention(config)
        self.attention_norm = layer_norm(config.layer_norm_eps)
        wide, reference = (config.model_dim, config.ffn_width), (REFERENCE_DIM, REFERENCE_FFN)
        scales = (
            width_scale(config, wide, reference),
            width_scale(config, wide[::-1], reference[::-1]),
        )
        self.ffn = GLU(*wide, ("embed", "ffn"), dtype, scales=scales)
        self.ffn_norm = layer_norm(config.layer_norm_eps)

    def __call__(
        self, x_BTD: jax.Array, inputs: AttentionInputs, g_lm_BNHJ: jax.Array | None
    ) -> tuple[jax.Array, LayerOutputs]:
        """Hidden states [B,T,D] to hidden states, and this layer's keys, values and deductive
        outputs.
        """
        attended_BTD, layer = self.attention(x_BTD, inputs, g_lm_BNHJ)
        return self._feed_forward(x_BTD, attended_BTD, self.ffn), layer

    def extend(
        self,
        x_BTD: jax.Array,
        first: jax.Array,
        k_BSNH: jax.Array,
        v_BSNH: jax.Array,
        g_lm_BNHJ: jax.Array | None,
    ) -> tuple[jax.Array, LayerOutputs]:
        """As `Attention.extend`, for the whole layer."""
        attended_BTD, layer = self.attention.extend(x_BTD, first, k_BSNH, v_BSNH, g_lm_BNHJ)
        return self._feed_forward(x_BTD, attended_BTD, self.ffn), layer

    def decode(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: LayerCache,
    ) -> tuple[jax.Array, LayerCache]:
        """The newest token's hidden state [B,1,D] to its next one, and the layer's cache with the
        token in it.
        """
        attended_BTD, cache = self.attention.decode(x_BTD, positions_BT, cache)
        return self._feed_forward(x_BTD, attended_BTD, self.ffn.joined), cache

    def _feed_forward(
        self, x_BTD: jax.Array, attended_BTD: jax.Array, ffn: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        dtype = x_BTD.dtype
        x_BTD = self.attention_norm(x_BTD + attended_BTD).astype(dtype)
        x_BTD = self.ffn_norm(x_BTD + ffn(x_BTD)).astype(dtype)
        return constrain(x_BTD, "batch", "length", "activation_embed")


class Decoder(nn.Module):
    """PLDR-LLM: tokens to logits, with the deductive outputs of every layer. With `Model.task` the
    logits are [B,T,Y], of labels.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.embedding = Embedding(config)
        self.layers = DecoderLayer(config)
        self.head = Linear(
            (config.model_dim,),
            (config.head_width,),
            ("embed",),
            ("vocab",),
            jnp.dtype(config.dtype),
            use_bias=config.task != "sequence",
            scale=width_scale(
                config,
                (config.model_dim, config.head_width),
                (REFERENCE_DIM, config.head_width),
            ),
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        g_lm_LBNHJ: jax.Array | None = None,
        length_B: jax.Array | None = None,
        segments: Segments | None = None,
        g_length_B: jax.Array | None = None,
    ) -> ModelOutputs:
        """Full causal forward pass.

        Args:
          tokens_BT: token ids, rows left-aligned.
          g_lm_LBNHJ: G_LM to use instead of PLGA's, [L,B,N,H,J] or [L,1,N,H,J]; with segments
            [L,B * K,N,H,J] or [L,1,N,H,J].
          length_B: real tokens of each row; what lies beyond is padding. None: all are real.
          segments: of rows that hold several sequences; they know of padding themselves.
          g_length_B: tokens of each row, its first ones, that Q^T Q of every layer sums over. The
            logits from position g_length_B - 1 on then know nothing of later tokens. None: all
            real ones. Not with segments.

        Raises:
          ValueError: the model has a random or external G_LM and none was given.
        """
        hidden_BTD, layers = self.hidden(tokens_BT, g_lm_LBNHJ, length_B, segments, g_length_B)
        has_head = self.is_initializing() or "head" in self.variables["params"]
        logits: Any = self.logits(hidden_BTD) if has_head else None
        return ModelOutputs(logits, layers.deductive, hidden_BTD, layers)

    def hidden(
        self,
        tokens_BT: jax.Array,
        g_lm_LBNHJ: jax.Array | None = None,
        length_B: jax.Array | None = None,
        segments: Segments | None = None,
        g_length_B: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerOutputs]:
        """As `__call__`, without the head: hidden states [B,T,D], and what every layer returned,
        stacked [L, ...].
        """
        if g_lm_LBNHJ is None and self.config.g_source in ("random", "external"):
            raise ValueError(
                f"Model.g_source = {self.config.g_source!r}: there is no PLGA network, pass G_LM"
            )
        positions_BT = jnp.arange(tokens_BT.shape[1])[None, :]
        lengths = [length for length in (length_B, g_length_B) if length is not None]
        summed_BT = None
        if lengths:
            summed_BT = positions_BT < functools.reduce(jnp.minimum, lengths)[:, None]
        if segments is not None:
            assert g_length_B is None
            positions_BT = segments.positions_BT
        inputs = AttentionInputs(positions_BT, summed_BT, segments)
        x_BTD = self.embedding(tokens_BT)
        unstacked = None if self.is_initializing() else self.variables["params"]["layers"]
        if isinstance(unstacked, tuple):
            return _hidden_unstacked(self.config, unstacked, x_BTD, inputs, g_lm_LBNHJ)

        def body(
            layer: DecoderLayer, x_BTD: jax.Array, g_lm_BNHJ: jax.Array | None
        ) -> tuple[jax.Array, LayerOutputs]:
            return layer(x_BTD, inputs, g_lm_BNHJ)

        if self.config.remat != "none" or divided("embed", self.config.model_dim):
            policy = REMAT_POLICIES[self.config.remat]
            body = nn.remat(body, prevent_cse=self.config.unroll, policy=policy)
        scan = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
            unroll=self.config.num_layers if self.config.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
            # It traces twice, for broadcast values, of which there are none; draws depend on it.
            check_constancy_invariants=self.is_initializing(),
        )
        if divided("metric_in", self.config.head_dim) and not self.is_initializing():
            gather = functools.partial(_metric_learner_in_use, self.config)
            scan = nn.map_variables(scan, "params", trans_in_fn=gather)
        return scan(self.layers, x_BTD, g_lm_LBNHJ)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B,T,V], float32, from hidden states."""
        logits_BTV = self.head(x_BTD).astype(jnp.float32)
        return constrain(logits_BTV, "batch", "length", "vocab")


@functools.cache
def _axis_names(config: ModelConfig) -> Any:
    """The parameter tree, with its logical axes in place of each parameter."""
    boxed = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: leaf.names,
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )


def _metric_learner_in_use(config: ModelConfig, variables: Any) -> Any:
    """Variables of the stacked layers, or of one, with PLGA's small parameters gathered before the
    loop over layers, or that over residual layers: inside, many gathers would travel alone.
    """

    def gather(path: Any, names: Names, parameter: jax.Array) -> jax.Array:
        if "metric_in" not in names:
            return parameter
        names = names[-parameter.ndim :]  # of one layer: without "layers"
        linear = path[-1].key in ("kernel", "bias")
        return in_use(parameter, names, jnp.dtype(config.dtype) if linear else parameter.dtype)

    layers = variables["params"]
    attention, names = layers["attention"], _axis_names(config)["layers"]["attention"]
    if "plga" in names:
        plga = jax.tree.map_with_path(
            gather, names["plga"], attention["plga"], is_leaf=lambda x: isinstance(x, tuple)
        )
        attention = {**attention, "plga": plga}
    return {"params": {**layers, "attention": attention}}


def _hidden_unstacked(
    config: ModelConfig,
    layers: tuple[Params, ...],
    x_BTD: jax.Array,
    inputs: AttentionInputs,
    g_lm_LBNHJ: jax.Array | None,
) -> tuple[jax.Array, LayerOutputs]:
    """The layers of `Decoder.hidden`, from parameters that are not stacked."""
    decoder_layer = DecoderLayer(config, parent=None)
    gathered = divided("metric_in", config.head_dim)

    def body(
        layer: Params, x_BTD: jax.Array, g_lm_BNHJ: jax.Array | None
    ) -> tuple[jax.Array, LayerOutputs]:
        if gathered:
            layer = _metric_learner_in_use(config, {"params": layer})["params"]
        return apply(decoder_layer, layer, DecoderLayer.__call__, x_BTD, inputs, g_lm_BNHJ)

    return scan_layers(config, layers, body, x_BTD, g_lm_LBNHJ)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Initial parameters, each boxed with its logical axes (`flax.linen.unbox` takes the boxes
    off).
    """
    # Scanned, whatever the config says: unrolled, only compiling this would take minutes.
    config = dataclasses.replace(config, unroll=False)
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    learned = config.g_source in ("learned", "identity")
    g_lm = None if learned else jnp.zeros(g_lm_shape(config))
    return Decoder(config, parent=None).init(key, tokens_BT, g_lm)["params"]


def apply(
    module: M,
    params: Params,
    method: Callable[Concatenate[M, P], R],
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """A method of `module`, such as `Decoder.hidden`, as a pure function of its parameters."""
    result: R = nn.apply(method, module)({"params": params}, *args, **kwargs)
    return result


def forward(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    g_lm_LBNHJ: jax.Array | None = None,
    length_B: jax.Array | None = None,
    segments: Segments | None = None,
    g_length_B: jax.Array | None = None,
) -> ModelOutputs:
    """`Decoder.__call__` as a pure function of the parameters."""
    return apply(
        Decoder(config),
        params,
        Decoder.__call__,
        tokens_BT,
        g_lm_LBNHJ,
        length_B,
        segments,
        g_length_B,
    )


@functools.lru_cache(maxsize=8)
def compiled_forward(config: ModelConfig, mesh: Mesh | None) -> Callable[..., ModelOutputs]:
    """`forward` for a mesh, compiled; shared by all models of a config, so that new parameters
    compile nothing again.
    """
    return jax.jit(functools.partial(forward, config))


def decode_step(
    config: ModelConfig, unstacked: Params, tokens_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """One decode step: logits [B,V] after `tokens_B`, and the cache with those tokens in it.

    The layers run in a Python loop over per-layer cache leaves, so that each is updated in place
    when donated.

    Args:
      unstacked: what `unstack_layers` returns.
      tokens_B: the newest token of each row.
      cache: of fewer tokens than its capacity.
    """
    x_BTD = apply(Embedding(config), unstacked["embedding"], Embedding.__call__, tokens_B[:, None])
    positions_BT = cache.length_B[:, None]
    layers = []
    decoder_layer = DecoderLayer(config)
    for layer_params, layer in zip(unstacked["layers"], cache.layers, strict=True):
        x_BTD, layer = apply(
            decoder_layer, layer_params, DecoderLayer.decode, x_BTD, positions_BT, layer
        )
        layers.append(layer)
    logits_BTV = apply(Decoder(config), {"head": unstacked["head"]}, Decoder.logits, x_BTD)
    return logits_BTV[:, 0], Cache(layers=tuple(layers), length_B=cache.length_B + 1)
