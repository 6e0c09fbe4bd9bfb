"""Published checkpoints that are known by their revision, and what is published of them."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from pldr_jax.interop.weights import Checkpoint
from pldr_jax.model.audits import commutant_residual
from pldr_jax.model.decoder import forward
from pldr_jax.training.losses import dag_loss
from pldr_jax.verify.findings import Finding

PROMPTS, TOKENS, LIMIT = 8, 38, 1e-3


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
      name: on the hub.
      revision: of its repository, or how that begins; the name of its folder in the hub's cache.
      figures: by the names of `measured`; of any prompts, since its G_LM is the same for all.
    """

    name: str
    revision: str
    figures: Mapping[str, float]


PUBLISHED = (
    Published("fromthesky/PLDR-LLM-v51-SOC-110M-1", "7a34e2ca", {}),
    Published(
        "fromthesky/PLDR-LLM-v51-SOC-110M-5",
        "de8e539c0ba1829072f4b8c2c5fae3bde0a3a2d2",
        {
            "largest rank of A": 1,
            "largest A_LM": 6194.973,
            "largest norm of G_LM": 563.0385,
            "commutant residual of G_LM, median": 0.8066,
            "commutant residual of G_LM, least": 0.421,
            "commutant residual of G_LM, most": 0.993,
            "DAG loss of A_P, median": 1119.609,
            "DAG loss of G_LM, median": 1268.495,
        },
    ),
)
"""The figures of arXiv 2609.34130 and 2608.10288 that need no text of theirs."""


def recognised(checkpoint: Checkpoint) -> Published | None:
    """The published checkpoint that a folder holds, by the revision that it is named by."""
    names = checkpoint.folder.resolve().parts
    return next((one for one in PUBLISHED for n in names if n.startswith(one.revision)), None)


def published_findings(checkpoint: Checkpoint, published: Published) -> Iterator[Finding]:
    """Its figures, each against what this machine measures."""
    if not published.figures:
        return
    found = measured(checkpoint)
    short = published.name.rpartition("/")[2]
    for name, expected in published.figures.items():
        yield Finding(short, name, abs(found[name] / expected - 1), LIMIT)


def measured(checkpoint: Checkpoint) -> dict[str, float]:
    """The same figures of a checkpoint, over eight rows of random tokens."""
    model = dataclasses.replace(checkpoint.config.model, dtype="float32", plga_precision="highest")
    shape = (PROMPTS, min(TOKENS, model.context_length))
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
    run = jax.jit(functools.partial(forward, dataclasses.replace(model, unroll=False)))
    with jax.default_matmul_precision("highest"):
        outputs = run(checkpoint.params, tokens_BT, checkpoint.g_lm).deductive
    tensors = {name: np.asarray(value, np.float64) for name, value in outputs.items()}
    values = np.linalg.svd(tensors["A"], compute_uv=False)
    cutoff = 64 * np.finfo(np.float32).eps * values[..., :1]
    residuals = commutant_residual(model, tensors["G_LM"])
    dag = jax.jit(jax.vmap(dag_loss))
    each = {name: np.float32(x).reshape(-1, *x.shape[-2:]) for name, x in tensors.items()}
    heads = {name: float(np.median(dag(each[name]))) for name in ("A_P", "G_LM")}
    return {
        "largest rank of A": float((values > cutoff).sum(-1).max()),
        "largest A_LM": float(tensors["A_LM"].max()),
        "largest norm of G_LM": float(np.linalg.norm(tensors["G_LM"], axis=(-2, -1)).max()),
        "commutant residual of G_LM, median": float(np.median(residuals)),
        "commutant residual of G_LM, least": float(residuals.min()),
        "commutant residual of G_LM, most": float(residuals.max()),
        "DAG loss of A_P, median": heads["A_P"],
        "DAG loss of G_LM, median": heads["G_LM"],
    }
