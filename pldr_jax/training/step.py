"""The train state and the train step: pure functions, jitted once, the state donated."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pldr_jax.config import ExperimentConfig
from pldr_jax.data.rows import row_shape
from pldr_jax.model.counts.shapes import abstract_params, place_params
from pldr_jax.model.decoder import Params, init_params
from pldr_jax.model.lora import init_adapters, merge_adapters, without_head
from pldr_jax.partition import batch_sharding, constrain, shardings
from pldr_jax.training.causal import forward_neighbour, prefix_lengths, scored_share
from pldr_jax.training.laws.groups import without_frozen
from pldr_jax.training.laws.targets import (
    at_chosen_targets,
    count_targets,
    target_draws,
    with_dropout,
)
from pldr_jax.training.losses import (
    TokenLoss,
    dag_losses,
    dag_schedule,
    regularizer,
)
from pldr_jax.training.optimizer import global_norm, initial_state, learning_rates, update
from pldr_jax.training.rows import forward_rows, targets_of
from pldr_jax.training.vocabulary_loss import batch_loss

Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes, and the predefined G_LM that it does not.

    Attributes:
      step: updates made so far, int32.
      params: trained parameters, float32.
      opt_state: of the optimiser.
      g_lm: predefined G_LM [L,1,N,H,J]; None where it is learned or the identity.
      base: with `Lora.rank`, the parameters that the trained adapters belong to, which no update
        changes and no checkpoint holds; else None.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    g_lm: jax.Array | None
    base: Params | None = None


class InitialWeights(NamedTuple):
    """Weights that a run begins with, and takes over: their arrays are gone then.

    Attributes:
      params: of the model that is trained; without `head`, a new one is drawn.
      g_lm: its predefined G_LM [L,1,N,H,J]; None where it is learned or the identity.
      files: of the checkpoint, which the run folder keeps, by their paths there.
    """

    params: Params
    g_lm: jax.Array | None
    files: Mapping[str, bytes] = {}


def _new_state(config: ExperimentConfig, params: Params, g_lm: jax.Array | None) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, initial_state(config, params), g_lm)


def _random_state(
    config: ExperimentConfig, key: jax.Array, g_lm: jax.Array | None, head: Params | None = None
) -> TrainState:
    """`head`: that of a task, trained whole beside adapters; None draws it."""
    if not config.lora.rank:
        return _new_state(config, init_params(config.model, key), g_lm)
    params = init_adapters(config.model, config.lora, key)
    if config.model.task is not None:
        params["head"] = init_params(config.model, key)["head"] if head is None else head
    return _new_state(config, params, g_lm)


def abstract_state(
    config: ExperimentConfig, mesh: Mesh, g_lm: jax.Array | None = None
) -> TrainState:
    """The state, without `base`, as ShapeDtypeStructs with their shardings, which a checkpoint is
    restored into.
    """
    if config.lora.rank:
        boxed = jax.eval_shape(functools.partial(_random_state, config), jax.random.key(0), g_lm)
    else:
        new = functools.partial(_new_state, config)
        boxed = jax.eval_shape(new, abstract_params(config.model), g_lm)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings(boxed, mesh),
    )


def create_state(
    config: ExperimentConfig,
    mesh: Mesh,
    g_lm: jax.Array | None = None,
    params: Params | None = None,
) -> TrainState:
    """The state before the first update, sharded from the start: no device holds more than its
    share.

    Args:
      g_lm: predefined G_LM.
      params: to begin with, given up: what lies on the mesh already becomes the state's. None
        draws them with `Training.seed`. With `Lora.rank`, the base of the adapters, which are
        drawn, and the head of a task.
    """
    target = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh, g_lm))
    g_lm = jax.device_put(g_lm, target.g_lm)
    if params is not None and not config.lora.rank:
        params = jax.device_put(params, target.params)
        new = functools.partial(_new_state, config)
        return jax.jit(new, out_shardings=target, donate_argnums=0)(params, g_lm)
    init = functools.partial(_random_state, config)
    draw = jax.jit(lambda *given: nn.unbox(init(*given)), out_shardings=target)
    head = None if params is None or config.model.task is None else params["head"]
    head = jax.device_put(head, NamedSharding(mesh, PartitionSpec()))
    state = draw(jax.random.key(config.training.seed), g_lm, head)
    return with_base(config, mesh, state, params)


def with_base(
    config: ExperimentConfig, mesh: Mesh, state: TrainState, base: Params | None
) -> TrainState:
    """The state with the parameters that its adapters belong to; itself where it has none.

    Raises:
      ConfigError: it has adapters, and there is no base.
    """
    if not config.lora.rank:
        return state
    if base is None:
        config.lora.fail("rank", "adapters need the weights that they belong to: --init_from=DIR")
    base = without_head(config.model, base)
    return state.replace(base=place_params(config.model, base, mesh))


def model_params(config: ExperimentConfig, state: TrainState) -> Params:
    """The parameters of the model: those that are trained, or the base with its adapters."""
    if state.base is None:
        return state.params
    return merge_adapters(config.lora, state.base, state.params)


def loss_fn(
    config: ExperimentConfig,
    params: Params,
    g_lm: jax.Array | None,
    rows_BC: jax.Array,
    g_length_B: jax.Array | None = None,
    dag_scale: jax.Array | float = 1.0,
    draw_B: jax.Array | None = None,
) -> tuple[jax.Array, tuple[TokenLoss, dict[str, jax.Array]]]:
    """The training loss of a batch: the cross-entropy of each token given those before it, plus the
    weighted DAG losses.

    Args:
      rows_BC: rows of any packing, [B,C] or [B,3,T].
      g_length_B: tokens at the start of each row that G_LM is computed from, `prefix_lengths`.
      dag_scale: factor of the DAG coefficients, `dag_schedule`.
      draw_B: what a random target of each row, or its dropout, follows from, `target_draws`.

    Returns:
      The scalar that is minimised, and (cross-entropy and accuracy, DAG losses where they are
      trained on).
    """
    if config.loss.g_from == "neighbour":
        outputs, targets_BT, real_B = forward_neighbour(config, params, rows_BC)
    else:
        outputs, targets_BT, real_B = forward_rows(
            config.model, params, rows_BC, config.data.segments_per_row, g_lm, g_length_B
        )
    outputs, targets_BT = at_chosen_targets(config, params, outputs, targets_BT, draw_B)
    outputs = with_dropout(config, params, outputs, draw_B)
    tokens = batch_loss(config, params, outputs, targets_BT)
    weights = (config.loss.dag_a_lm, config.loss.dag_a_p, config.loss.dag_g_lm)
    # Their matrix exponentials cost time.
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
    G = `Training.grad_accumulation` microbatches.

    Microbatches are weighted by their targets, so that the sum is the gradient of the whole batch.
    Each takes every G-th row, so that on a mesh it is spread over all devices. (DAG losses are
    averaged over microbatches, which is another mean where rows hold unequal numbers of segments.)

    Args:
      rows_BC: rows of any packing, [B,C] or [B,3,T].
      step: updates made before; decides random prefixes and the DAG coefficients.
    """
    g_length_B = prefix_lengths(config, rows_BC, step)
    draw_B = target_draws(config, len(rows_BC), step)
    dag_scale = dag_schedule(config.loss, step)
    n_micro = config.training.grad_accumulation
    if n_micro == 1:
        loss = jax.value_and_grad(functools.partial(loss_fn, config), has_aux=True)
        (total, (tokens, dag)), grads = loss(params, g_lm, rows_BC, g_length_B, dag_scale, draw_B)
        return total, tokens, dag, grads

    def split(x: jax.Array) -> jax.Array:
        x_GB = jnp.swapaxes(x.reshape(-1, n_micro, *x.shape[1:]), 0, 1)
        return constrain(x_GB, None, "batch", *(None,) * (x.ndim - 1))

    batch_GB = jax.tree.map(split, (rows_BC, g_length_B, draw_B))
    count = count_targets(config, targets_of(rows_BC, g_length_B))
    count = jnp.maximum(count, 1).astype(jnp.float32)

    def micro_loss(
        params: Params, rows: jax.Array, g_length_B: Any, draw_B: Any
    ) -> tuple[jax.Array, Any]:
        _, (tokens, dag) = loss_fn(config, params, g_lm, rows, g_length_B, dag_scale, draw_B)
        total = tokens.loss_sum / count + dag_scale * regularizer(config.loss, dag) / n_micro
        return total, (tokens, jax.tree.map(lambda value: value / n_micro, dag))

    value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)

    def body(sums: Any, micro: tuple[jax.Array, Any, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, value_and_grad(params, *micro)), None

    shapes = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda x_GB: x_GB[0], batch_GB))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((total, (tokens, dag)), grads), _ = jax.lax.scan(body, zeros, batch_GB)
    return total, tokens, dag, grads


def train_step(
    config: ExperimentConfig, state: TrainState, rows_BC: jax.Array
) -> tuple[TrainState, Metrics]:
    """One update. Pure; `jit_train_step` compiles it for a mesh.

    With `Training.skip_nonfinite` an update is made if and only if all its metrics are finite.

    Args:
      rows_BC: rows of any packing, int32 [B,C] or [B,3,T] (`pldr_jax/data/rows.py`).

    Returns:
      The state after it, and its metrics. The norm of the parameters is that of the new ones,
      also where they are not kept.
    """
    params, pull_back = jax.vjp(
        lambda trained: model_params(config, state.replace(params=trained)), state.params
    )
    total, tokens, dag, grads = accumulated_gradients(
        config, params, state.g_lm, rows_BC, state.step
    )
    (grads,) = pull_back(grads)  # those of adapters alone, where there are any
    grads = without_frozen(config.training.freeze, state.step, grads)
    with jax.named_scope("optimizer"):
        params, opt_state, updates = update(
            config, grads, state.opt_state, state.params, state.step
        )
        metrics = {
            "train/loss": tokens.loss,
            "train/total_loss": total,
            "train/accuracy": tokens.accuracy,
            **learning_rates(config, state.opt_state),
            "train/grad_norm": global_norm(grads),
            "train/update_norm": global_norm(updates),
            "train/param_norm": global_norm(params),
            **{f"train/dag_loss/{name}": value for name, value in dag.items()},
        }
        if config.training.skip_nonfinite:
            finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
    g_length_B = prefix_lengths(config, rows_BC, state.step)
    if g_length_B is not None and config.loss.g_from != "prompt":
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
