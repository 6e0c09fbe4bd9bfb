"""Deductive outputs over HTTP."""

import numpy as np
import pytest
from serving import metric, post

import pldr_jax
from pldr_jax.serve.server import Server

pytest_plugins = ("serving",)


def test_deductive_outputs_are_those_of_the_forward_pass(
    server: Server, lm: pldr_jax.LanguageModel
) -> None:
    text, other = "def the token", "model layer"
    before = metric(server, "pldr_compilations_total")
    body = {"text": text, "outputs": ["G_LM", "A"], "layers": [1], "heads": [1, 0]}
    status, answer, _ = post(server, "/v1/deductive", {**body, "reference": other})
    assert status == 200, answer
    assert metric(server, "pldr_compilations_total") == before
    outputs = lm([lm.encode(text)]).deductive
    others = lm([lm.encode(other)]).deductive
    for name, expected, reference in (
        ("G_LM", outputs.G_LM, others.G_LM), ("A", outputs.A, others.A),
    ):  # fmt: skip
        told = answer["outputs"][name]
        x = np.asarray(expected, np.float64)[1:, 0][:, ::-1]
        y = np.asarray(reference, np.float64)[1:, 0][:, ::-1]
        assert np.asarray(told["values"]) == pytest.approx(x, rel=1e-3, abs=1e-4)
        sign, log = np.linalg.slogdet(np.asarray(told["values"]))
        assert told["determinant_sign"] == sign.tolist()
        assert np.asarray(told["determinant_log10"]) == pytest.approx(log / np.log(10))
        order = np.sqrt(np.square(x - y).mean()) / abs(np.concatenate([x, y]).mean())
        assert told["order_parameter"]["all"] == pytest.approx(order, rel=1e-2)
        singular = np.linalg.svd(np.asarray(told["values"]), compute_uv=False)
        least = singular.max(-1, keepdims=True) * 8 * np.finfo(np.float32).eps
        assert told["rank"] == (singular > least).sum(-1).tolist()
    short = post(server, "/v1/deductive", {"text": text, "values": False})[1]["outputs"]["G_LM"]
    assert "values" not in short and np.asarray(short["rank"]).shape == (2, 2)
    for bad, param in (
        ({"text": ""}, "text"), ({"text": text, "layers": [2]}, "layers"),
        ({"text": text, "heads": []}, "heads"), ({"text": text, "outputs": ["B"]}, "outputs"),
        ({"text": text, "outputs": ["A"], "g_text": "x"}, "outputs"),
        ({"text": text, "nothing": 1}, "nothing"), ({"text": "a " * 40}, "text"),
    ):  # fmt: skip
        made, error, _ = post(server, "/v1/deductive", bad)
        assert (made, error["error"]["param"]) == (400, param)
