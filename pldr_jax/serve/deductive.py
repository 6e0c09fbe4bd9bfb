"""`/v1/deductive`: the deductive outputs of a text, which no other kind of model has."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.config.fields import field
from pldr_jax.config.sampling import Keywords, override
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.serve.bodies import tokens_of
from pldr_jax.serve.served import Served, gain_of
from pldr_jax.serve.wire import ApiError
from pldr_jax.training.order_parameter import DeductiveStatistics

NAMES = ("A", "A_LM", "A_P", "G_LM")
MAX_VALUES = 4_000_000
"""Entries of tensors in one answer."""


@dataclasses.dataclass(frozen=True)
class DeductiveBody(Keywords):
    """The fields of `/v1/deductive`."""

    text: str = field("", "the text")
    model: str | None = field(None, "the name of the model served")
    outputs: tuple[str, ...] = field(("G_LM",), "of A, A_LM, A_P and G_LM")
    layers: tuple[int, ...] | None = field(None, "numbers of layers; none: all", low=0)
    heads: tuple[int, ...] | None = field(None, "numbers of heads; none: all", low=0)
    values: bool = field(True, "send the tensors, not only what is measured of them")
    reference: str | None = field(None, "a text that the order parameter is taken against")
    g_mode: str | None = field(None, "where G_LM comes from")
    g_text: str | None = field(None, "a text whose G_LM is taken")


async def deductive(served: Served, values: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a body.

    Raises:
      ApiError: a field that cannot be used, or an output that this model has not.
    """
    plain = dict(values)
    factors = plain.pop("gain", None)
    try:
        (body,) = override(plain, DeductiveBody())
    except ConfigError as error:
        raise ApiError.of(error) from None
    config = served.lm.config
    if body.model not in (None, served.name):
        raise ApiError(404, f"model: there is {served.name!r} alone", "model", "model_not_found")
    for name in body.outputs:
        if name not in NAMES:
            raise ApiError(400, f"outputs: {name!r} is none of {', '.join(NAMES)}", "outputs")
    layers = _numbers("layers", body.layers, config.num_layers)
    heads = _numbers("heads", body.heads, config.num_heads)
    size = len(body.outputs) * len(layers) * len(heads) * config.head_dim**2
    if body.values and size > MAX_VALUES:
        raise ApiError(400, f"layers: {size} values are too many; choose layers or heads", "layers")
    gain = None if factors is None else gain_of(factors, config.num_layers, config.num_heads)
    mode = body.g_mode or served.g_mode
    served.check_given(mode, body.g_text, gain)
    g_text = None if body.g_text is None else tokens_of(body.g_text, served, "g_text")
    tokens = tokens_of(body.text, served, "text")
    texts = [tokens]
    if body.reference is not None:
        texts.append(tokens_of(body.reference, served, "reference"))

    def read() -> list[DeductiveOutputs]:
        given = served.given(mode, g_text, gain)
        read = [served.read(text, given).deductive for text in texts]
        return [jax.device_get(outputs) for outputs in read]

    results = await served.worker.call(read)
    chosen = np.ix_(layers, heads)
    answer = await asyncio.to_thread(_measure, body, results, chosen)
    head = {"object": "deductive", "model": served.name, "tokens": len(tokens)}
    return {**head, "layers": layers, "heads": heads, "outputs": answer}


def _numbers(name: str, given: Sequence[int] | None, count: int) -> list[int]:
    numbers = list(range(count)) if given is None else list(given)
    if not numbers or len(set(numbers)) < len(numbers) or max(numbers) >= count:
        raise ApiError(400, f"{name}: must be different numbers below {count}", name)
    return numbers


def _measure(
    body: DeductiveBody, results: Sequence[DeductiveOutputs], chosen: Any
) -> dict[str, dict[str, Any]]:
    """What is told of each output."""
    answer = {}
    for name in dict.fromkeys(body.outputs):
        tensors = []
        for outputs in results:
            tensor = dict(outputs.items()).get(name)
            if tensor is None:
                raise ApiError(400, f"outputs: with a given G_LM there is no {name}", "outputs")
            tensors.append(np.asarray(tensor)[:, 0][chosen].astype(np.float64))
        x_LNHJ = tensors[0]
        told: dict[str, Any] = {"shape": list(x_LNHJ.shape), **_of_matrices(x_LNHJ)}
        if len(tensors) > 1:
            told["order_parameter"] = _order_parameters(*tensors)
        if body.values:
            told["values"] = _plain(x_LNHJ)
        answer[name] = told
    return answer


def _of_matrices(x_LNHJ: np.ndarray) -> dict[str, Any]:
    """Rank, as float32 knows it, and determinant of each matrix."""
    if not np.isfinite(x_LNHJ).all():
        return {"rank": None, "determinant_sign": None, "determinant_log10": None}
    singular = np.linalg.svd(x_LNHJ, compute_uv=False)
    least = singular.max(-1, keepdims=True) * x_LNHJ.shape[-1] * np.finfo(np.float32).eps
    sign, log = np.linalg.slogdet(x_LNHJ)
    return {
        "rank": (singular > least).sum(-1).tolist(),
        "determinant_sign": sign.tolist(),
        "determinant_log10": _plain(log / np.log(10)),
    }


def _order_parameters(x_LNHJ: np.ndarray, y_LNHJ: np.ndarray) -> dict[str, Any]:
    """RMSE between two texts over the magnitude of the mean, of each layer and of all."""
    statistics = DeductiveStatistics()
    statistics.add_pairs(x_LNHJ[:, None], y_LNHJ[:, None])
    layers = [statistics.spread(layer) for layer in range(len(x_LNHJ))]
    whole = statistics.spread()
    return {
        "layers": _plain(np.array([one.order_parameter for one in layers])),
        "all": _plain(np.array(whole.order_parameter)),
        "rmse": _plain(np.array(whole.rmse)),
    }


def _plain(x: np.ndarray) -> Any:
    """Nested lists, null where JSON has no number."""
    plain = x.astype(object)
    plain[~np.isfinite(x)] = None
    return plain.tolist()
