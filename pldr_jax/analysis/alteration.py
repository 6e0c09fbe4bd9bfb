"""What held-out text loses when attention gets another G_LM than its own.

Each alteration replaces G_LM at inference: by the identity (scaled dot-product attention), by
random entries, by one tensor for all texts, by that of another model; or by the model's own in the
wrong place, which tells whether a head needs its G_LM or any. Measured are loss, accuracy, and the
KL divergence of the predictions from those with the model's own G_LM.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.analysis.batches import (
    check_finite,
    mean_g_lm,
    predefined_or_identity,
    split_calibration,
)
from pldr_jax.analysis.figures import picture
from pldr_jax.analysis.section import DEFAULTS, Cell, ModelSection, Picture, Settings, Table
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.model.decoder import Params
from pldr_jax.model.deductive import DeductiveOutputs, identity_g_lm, random_g_lm
from pldr_jax.model.plga import curvature
from pldr_jax.plots import COLORS, GREY, new_figure
from pldr_jax.training.freeze.certificate import kl_divergence
from pldr_jax.training.losses import TokenLoss, token_loss

Alter = Callable[[DeductiveOutputs], jax.Array]
"""G_LM [L,B,N,H,J], or [L,1,N,H,J] for all rows, from the model's own deductive outputs."""

OWN = "own"
ALTERED_NAMES = (OWN, "mean", "identity", "random", "G_LM_heads", "G_LM_layers", "A_LM_heads")
"""What no G_LM from elsewhere may be called."""
NOTICEABLE = 0.01
"""Nats a token; a larger change of the loss is called felt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alteration(ModelSection):
    """Held-out loss, accuracy and KL divergence (nats a token) with other G_LM at inference.

    Attributes:
      descriptions: of the G_LMs, by name.
    """

    key = "alteration"
    title = "Other G_LM at inference"
    descriptions: dict[str, str]

    @classmethod
    def measure(
        cls,
        model: LanguageModel,
        rows_RC: np.ndarray,
        settings: Settings = DEFAULTS,
        seed: int = 0,
    ) -> Self:
        """Scores rows with every other G_LM.

        Args:
          model: with a learned or predefined G_LM.
          rows_RC: the first of them (`split_calibration`) give the mean G_LM; the others are
            scored.
          settings: `other_g` names more G_LM to try: tensors [L,N,H,J], or models of the same
            shape, whose G_LM is averaged over the rows that give the mean.
          seed: of the random G_LM.

        Raises:
          ConfigError: fewer than two rows, a G_LM of another shape, a name of `ALTERED_NAMES`, or
            logits of the model itself that are not finite.
        """
        if len(rows_RC) < 2:
            raise ConfigError(
                f"rows: {len(rows_RC)} of held-out text; altering G_LM needs at least 2"
            )
        if taken := set(ALTERED_NAMES) & set(settings.other_g):
            raise ConfigError(
                f"others: {min(taken)!r} is one of {', '.join(ALTERED_NAMES)}; rename it"
            )
        calibration_RC, scored_RC = split_calibration(rows_RC)
        others = {
            name: _outside_g_lm(model, name, source, calibration_RC)
            for name, source in settings.other_g.items()
        }
        tried = alterations(model, calibration_RC, seed, others)
        settings.advance(len(calibration_RC))
        sums = _score(model, scored_RC, tried, settings)
        values = {
            name: {
                "loss": float(loss / count),
                "accuracy": float(correct / count),
                "kl": float(kl / count),
            }
            for name, (loss, correct, count, kl) in sums.items()
        }
        descriptions = {OWN: "the model's own, of each row"}
        return cls(
            numbers={
                "rows": len(scored_RC),
                "calibration_rows": len(calibration_RC),
                "alterations": values,
            },
            descriptions=descriptions | {altered.name: altered.words for altered in tried},
        )

    def words(self) -> tuple[str, ...]:
        scored, averaged = self.numbers["rows"], self.numbers["calibration_rows"]
        return (
            _verdict(self.numbers["alterations"]),
            f"Scored on {scored} held-out rows; {averaged} others gave means.",
        )

    def tables(self) -> tuple[Table, ...]:
        values = self.numbers["alterations"]
        own = values[OWN]["loss"]
        rows: list[tuple[Cell, ...]] = [
            (
                self.descriptions[name],
                value["loss"],
                value["loss"] - own,
                value["accuracy"],
                value["kl"],
            )
            for name, value in values.items()
        ]
        columns = ("G_LM", "loss", "change", "accuracy", "KL from own")
        return (Table("Held-out text with another G_LM, nats a token", columns, tuple(rows)),)

    def figures(self) -> tuple[Picture, ...]:
        values = self.numbers["alterations"]
        return (_figure(values),) if len(values) > 1 else ()


@dataclasses.dataclass(frozen=True)
class AlteredG:
    """Another G_LM.

    Attributes:
      name: a key.
      words: what it is.
      alter: how to compute it.
    """

    name: str
    words: str
    alter: Alter


def rotate_heads(x_LBNHJ: jax.Array) -> jax.Array:
    """Each head gets the tensor of the head before it, the first that of the last."""
    return jnp.roll(x_LBNHJ, 1, axis=2)


def rotate_layers(x_LBNHJ: jax.Array) -> jax.Array:
    """Each layer gets the tensor of the layer before it, the first that of the last."""
    return jnp.roll(x_LBNHJ, 1, axis=0)


def recomputed_g_lm(params: Params, A_LM: jax.Array) -> jax.Array:
    """G_LM [L,B,N,H,J] from another A_LM [L,B,N,H,J], each head with its own P, a and b_a.

    Args:
      params: of a model with learned G_LM.
    """
    plga = params["layers"]["attention"]["plga"]
    return jax.vmap(curvature)(A_LM, plga["P"], plga["a"], plga["b_a"])[1]


def calibrated_g_lm(model: LanguageModel, rows_RC: np.ndarray, batch_size: int = 16) -> jax.Array:
    """Mean of G_LM [L,1,N,H,J] over rows, summed in float64; a predefined one is itself."""
    mean_LNHJ = mean_g_lm(model, rows_RC[:, :-1], batch_size)
    return jnp.asarray(mean_LNHJ[:, None], jnp.float32)


def alterations(
    model: LanguageModel, calibration_RC: np.ndarray, seed: int, others: Mapping[str, jax.Array]
) -> list[AlteredG]:
    """What this model's G_LM is replaced by, in the order of the report.

    Args:
      calibration_RC: rows for the mean of a learned G_LM.
      seed: of the random G_LM.
      others: G_LM [L,1,N,H,J] from elsewhere, by name.
    """
    config = model.config
    learned = config.g_source == "learned"
    tried = []
    if learned:
        mean = calibrated_g_lm(model, calibration_RC)
        words = f"one for all texts: the mean over {len(calibration_RC)} other rows"
        tried.append(AlteredG("mean", words, _constant(mean)))
    for name, g_lm in others.items():
        tried.append(AlteredG(name, f"given: {name}", _constant(g_lm)))
    if config.g_source != "identity":
        identity, random = identity_g_lm(config), random_g_lm(config, seed)
        sdpa = "the identity: scaled dot-product attention"
        tried.append(AlteredG("identity", sdpa, _constant(identity)))
        words = f"standard normal entries, seed {seed}"
        tried.append(AlteredG("random", words, _constant(random)))
        if config.num_heads > 1:
            words = "own, of the head before it in the layer"
            tried.append(AlteredG("G_LM_heads", words, lambda own: rotate_heads(_g_lm(own))))
        if config.num_layers > 1:
            words = "own, of the layer before it"
            tried.append(AlteredG("G_LM_layers", words, lambda own: rotate_layers(_g_lm(own))))
    if learned and config.num_heads > 1:

        def mismatched(own: DeductiveOutputs) -> jax.Array:
            assert own.A_LM is not None
            return recomputed_g_lm(model.params, rotate_heads(own.A_LM))

        words = "recomputed from A_LM of the head before it, with the head's own P, a and b_a"
        tried.append(AlteredG("A_LM_heads", words, mismatched))
    return tried


def _outside_g_lm(
    model: LanguageModel,
    name: str,
    source: np.ndarray | jax.Array | LanguageModel,
    calibration_RC: np.ndarray,
) -> jax.Array:
    """A G_LM from elsewhere as [L,1,N,H,J]."""
    if isinstance(source, LanguageModel):
        g_lm: jax.Array = calibrated_g_lm(source, calibration_RC)
    else:
        g_lm = jnp.asarray(source)
    need = identity_g_lm(model.config).shape
    if g_lm.shape == need[:1] + need[2:]:
        g_lm = g_lm[:, None]
    if g_lm.shape != need:
        raise ConfigError(
            f"{name}: G_LM has shape {g_lm.shape}, this model needs {need[:1] + need[2:]} [L,N,H,H]"
        )
    return g_lm


def _constant(g_lm: jax.Array) -> Alter:
    return lambda own: g_lm


def _g_lm(own: DeductiveOutputs) -> jax.Array:
    assert own.G_LM is not None
    return own.G_LM


def _score(
    model: LanguageModel, rows_RC: np.ndarray, tried: list[AlteredG], settings: Settings
) -> dict[str, np.ndarray]:
    """`_sums` over all rows, of each G_LM by name."""
    sums = {name: np.zeros(4) for name in (OWN, *(altered.name for altered in tried))}
    for start in range(0, len(rows_RC), settings.batch_size):
        rows = rows_RC[start : start + settings.batch_size]
        tokens_BT, targets_BT = rows[:, :-1], rows[:, 1:]
        outputs = model(tokens_BT)
        check_finite("logits of held-out rows", outputs.logits)
        deductive = outputs.deductive
        if deductive.G_LM is None:
            deductive = DeductiveOutputs(G_LM=predefined_or_identity(model))
        sums[OWN] += _sums(outputs.logits, outputs.logits, targets_BT)
        for altered in tried:
            logits = model(tokens_BT, g_lm=altered.alter(deductive)).logits
            sums[altered.name] += _sums(outputs.logits, logits, targets_BT)
        settings.advance(len(tokens_BT))
    return sums


@jax.jit
def _compare(
    own_BTV: jax.Array, other_BTV: jax.Array, targets_BT: jax.Array
) -> tuple[TokenLoss, jax.Array]:
    return token_loss(other_BTV, targets_BT), kl_divergence(own_BTV, other_BTV).sum(-1)


def _sums(own_BTV: jax.Array, other_BTV: jax.Array, targets_BT: np.ndarray) -> np.ndarray:
    """Loss, correct predictions, targets, and KL divergence: float64 sums over a batch."""
    loss, kl_B = jax.device_get(_compare(own_BTV, other_BTV, targets_BT))
    kl = np.asarray(kl_B, np.float64).sum()
    return np.asarray([loss.loss_sum, loss.correct, loss.count, kl], np.float64)


def _verdict(values: Mapping[str, Mapping[str, float]]) -> str:
    own = values[OWN]["loss"]
    changes = {name: value["loss"] - own for name, value in values.items() if name != OWN}
    if not changes:
        return "There is no other G_LM to try."
    felt = [name for name, change in changes.items() if not abs(change) <= NOTICEABLE]
    text = f"With its own G_LM the loss is {own:.4f} nats a token. "
    if not felt:
        return text + f"No other one changes it by more than {NOTICEABLE} nats."
    worst = max(changes, key=lambda name: np.nan_to_num(changes[name], nan=np.inf))
    text += f"{len(felt)} of {len(changes)} others change it by more than {NOTICEABLE} nats"
    text += f"; {worst} the most, by {changes[worst]:+.3f}."
    if "mean" in changes:
        verb = "is felt" if "mean" in felt else "is not felt"
        text += f" One tensor for all texts {verb} ({changes['mean']:+.4f})."
    return text


def _figure(values: Mapping[str, Mapping[str, float]]) -> Picture:
    names = [name for name in values if name != OWN]
    figure, axes = new_figure(1, 2, width=9.0, height=1.4 + 0.36 * len(names), sharey=True)
    own = values[OWN]["loss"]
    panels = (
        ("change of the loss (nats a token)", [values[n]["loss"] - own for n in names]),
        ("KL from the model's own (nats a token)", [values[n]["kl"] for n in names]),
    )
    places = np.arange(len(names))[::-1]
    for axis, color, (title, numbers) in zip(axes[0], COLORS, panels, strict=False):
        # What is not finite has no bar; the text at its place says so.
        shown = np.nan_to_num(np.asarray(numbers), nan=0.0, posinf=0.0, neginf=0.0)
        axis.barh(places, shown, color=color, height=0.65)
        axis.axvline(0, color=GREY, linewidth=1)
        axis.set_xscale("symlog", linthresh=1e-3)
        axis.set_yticks(places, names)
        axis.set_title(title, fontsize=10)
        low, high = min(0.0, *shown), max(1e-3, *shown)
        axis.set_xlim(8 * low, 8 * high)
        for place, value, number in zip(places, shown, numbers, strict=True):
            side = "right" if value < 0 else "left"
            axis.text(value, place, f" {number:.2g} ", va="center", ha=side, fontsize=9)
    caption = (
        "What another G_LM at inference does to held-out text. Heads and layers: the model's own "
        "tensors, one place further on."
    )
    return picture("alteration", caption, figure)
