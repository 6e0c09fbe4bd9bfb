"""The train state and the train step: pure functions, jitted once, the state donated."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pldr_jax.config import ExperimentConfig
from pldr_jax.data.rows import row_shape
from pldr_jax.model.decoder import Params, init_params
from pldr_jax.partition import batch_sharding, constrain, shardings
from pldr_jax.training.causal import forward_neighbour, prefix_lengths, scored_share
from pldr_jax.training.losses import (
    PAD_ID,
    TokenLoss,
    dag_losses,
    dag_schedule,
    regularizer,
    token_loss,
)
from pldr_jax.training.optimizer import build_optimizer, global_norm, learning_rate_schedule
from pldr_jax.training.rows import forward_rows, targets_of
from pldr_jax.training.vocabulary_loss import chunked_token_loss

Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes, and the predefined G_LM that it does not.

    Attributes:
      step: updates made so far, int32.
      params: trained parameters, float32.
      opt_state: of the optimiser.
      g_lm: predefined G_LM [L,1,N,H,J]; None where it is learned or the identity.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    g_lm: jax.Array | None


def _init_state(config: ExperimentConfig, key: jax.Array, g_lm: jax.Array | None) -> TrainState:
    params = init_params(config.model, key)
    opt_state = build_optimizer(config.optimizer, config.training.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, g_lm)


def abstract_state(
    config: ExperimentConfig, mesh: Mesh, g_lm: jax.Array | None = None
) -> TrainState:
    """The state as ShapeDtypeStructs that carry their shardings: what a checkpoint is restored
    into.
    """
    boxed = jax.eval_shape(functools.partial(_init_state, config), jax.random.key(0), g_lm)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings(boxed, mesh),
    )


def create_state(config: ExperimentConfig, mesh: Mesh, g_lm: jax.Array | None = None) -> TrainState:
    """The initial state, born sharded: no device ever holds more than its part."""
    target = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh, g_lm))
    init = jax.jit(lambda key, g_lm: nn.unbox(_init_state(config, key, g_lm)), out_shardings=target)
    return init(jax.random.key(config.training.seed), g_lm)


def loss_fn(
    config: ExperimentConfig,
    params: Params,
    g_lm: jax.Array | None,
    rows_BC: jax.Array,
    g_length_B: jax.Array | None = None,
    dag_scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, tuple[TokenLoss, dict[str, jax.Array]]]:
    """The training loss of rows of any packing: each token given those before it, plus the weighted
    DAG losses.

    Args:
      g_length_B: first tokens that G_LM of each row is computed from, `prefix_lengths`.
      dag_scale: factor of the DAG coefficients, `dag_schedule`.

    Returns:
      The scalar that is minimised, and (cross-entropy and accuracy, the DAG losses that were
      computed).
    """
    if config.loss.g_from == "neighbour":
        outputs, targets_BT, real_B = forward_neighbour(config, params, rows_BC)
    else:
        outputs, targets_BT, real_B = forward_rows(
            config.model, params, rows_BC, config.data.segments_per_row, g_lm, g_length_B
        )
    if chunk := min(config.loss.chunk, targets_BT.shape[1]):
        # Nothing reads outputs.logits then, so that the compiler leaves them out.
        tokens = chunked_token_loss(config.model, params, outputs.hidden, targets_BT, chunk)
    else:
        tokens = token_loss(outputs.logits, targets_BT)
    weights = (config.loss.dag_a_lm, config.loss.dag_a_p, config.loss.dag_g_lm)
    # Their matrix exponentials cost time: in the step only where they are trained on; evaluation
    # always has them.
    dag = dag_losses(outputs.deductive, real_B) if any(weights) else {}
    return tokens.loss + dag_scale * regularizer(config.loss, dag), (tokens, dag)


def accumulated_gradients(
    config: ExperimentConfig,
    params: Params,
    g_lm: jax.Array | None,
    rows_BC: jax.Array,
    step: jax.Array | int = 0,
) -> tuple[jax.Array, TokenLoss, dict[str, jax.Array], Params]:
    """(Total loss, cross-entropy and accuracy, DAG losses, gradients) of a batch, computed in
    `Training.grad_accumulation` parts.

    The parts are weighted by their targets, so that the sum is the gradient of the whole batch, and
    take rows in turns, so that on a mesh every part is spread over all devices. (DAG losses are
    averaged over parts, which is another mean where rows hold unequal numbers of segments.)

    Args:
      step: updates made before; decides random prefixes and the DAG coefficients.
    """
    g_length_B = prefix_lengths(config, rows_BC, step)
    dag_scale = dag_schedule(config.loss, step)
    value_and_grad = jax.value_and_grad(functools.partial(loss_fn, config), has_aux=True)
    parts = config.training.grad_accumulation
    if parts == 1:
        (total, (tokens, dag)), grads = value_and_grad(params, g_lm, rows_BC, g_length_B, dag_scale)
        return total, tokens, dag, grads

    def in_turns(x: jax.Array) -> jax.Array:
        x_PB = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
        return constrain(x_PB, None, "batch", *(None,) * (x.ndim - 1))

    split = jax.tree.map(in_turns, (rows_BC, g_length_B))
    targets_BT = targets_of(rows_BC, g_length_B)
    count = jnp.maximum((targets_BT != PAD_ID).sum(), 1).astype(jnp.float32)

    def part_loss(params: Params, part: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        _, (tokens, dag) = loss_fn(config, params, g_lm, *part, dag_scale)
        total = tokens.loss_sum / count + dag_scale * regularizer(config.loss, dag) / parts
        return total, (tokens, jax.tree.map(lambda value: value / parts, dag))

    def body(carry: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
        (total, aux), grads = jax.value_and_grad(part_loss, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, carry, (total, aux, grads)), None

    first = jax.tree.map(lambda x_PB: x_PB[0], split)
    shapes = jax.eval_shape(jax.value_and_grad(part_loss, has_aux=True), params, first)
    (total, aux), grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (total, (tokens, dag), grads), _ = jax.lax.scan(body, (total, aux, grads), split)
    return total, tokens, dag, grads


def train_step(
    config: ExperimentConfig, state: TrainState, rows_BC: jax.Array
) -> tuple[TrainState, Metrics]:
    """One update. Pure; `jit_train_step` compiles it for a mesh.

    Args:
      rows_BC: int32 [B, context_length] token ids, of which C make C - 1 inputs and targets; of
        `Data.packing` "document" and "packed" [B,3,T], as in `pldr_jax/data/rows.py`.
    """
    optimizer = build_optimizer(config.optimizer, config.training.steps)
    total, tokens, dag, grads = accumulated_gradients(
        config, state.params, state.g_lm, rows_BC, state.step
    )
    grad_norm = global_norm(grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if config.training.skip_nonfinite:
            finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
    metrics = {
        "train/loss": tokens.loss,
        "train/total_loss": total,
        "train/accuracy": tokens.accuracy,
        "train/learning_rate": learning_rate_schedule(config.optimizer, config.training.steps)(
            state.step
        ),
        "train/grad_norm": grad_norm,
        "train/update_norm": global_norm(updates),
        "train/param_norm": global_norm(params),
        **{f"train/dag_loss/{name}": value for name, value in dag.items()},
    }
    g_length_B = prefix_lengths(config, rows_BC, state.step)
    if g_length_B is not None:
        metrics["train/scored_share"] = scored_share(rows_BC, g_length_B)
    if dag and (config.loss.dag_warmup_steps or config.loss.dag_until_step is not None):
        metrics["train/dag_scale"] = dag_schedule(config.loss, state.step)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def jit_train_step(
    config: ExperimentConfig, mesh: Mesh, state: TrainState
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """`train_step` compiled for a mesh. DONATES the state: use the one it returns."""
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    rows_shape = (
        config.data.batch_size,
        *row_shape(config.data.packing, config.model.context_length),
    )
    return jax.jit(
        functools.partial(train_step, config),
        in_shardings=(state_shardings, batch_sharding(mesh, rows_shape)),
        out_shardings=(state_shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
