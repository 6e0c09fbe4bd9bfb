"""The tables of structure."""

from typing import Any

import numpy as np

from pldr_jax.analysis.section import Cell, Table

HEADS_IN_A_TABLE = 32
"""Up to this many heads, of all layers together, each has a row; with more, each layer has one."""

MATRIX_COLUMNS = {
    "rank_0.1": "rank at 1e-1",
    "rank_0.01": "1e-2",
    "rank_0.001": "1e-3",
    "rank_0.0001": "1e-4",
    "rank_1e-06": "1e-6",
    "effective_rank": "effective rank",
    "condition": "condition number",
    "asymmetry": "||X - X^T|| / ||X||",
    "diagonal_share": "share on the diagonal",
    "small_0.001": "entries below 1e-3 of the largest",
    "norm": "norm",
}
ATTENTION_COLUMNS = {
    "entropy": "entropy, of the uniform one's",
    "distance": "mean distance, tokens",
    "on_itself": "on itself",
    "previous": "on the token before",
    "first": "on the first token",
}
ENTRY_COLUMNS = {
    "mean": "mean",
    "std": "std",
    "min": "smallest",
    "max": "largest",
    "negative": "share negative",
    "not_finite": "share not finite",
}


def structure_tables(numbers: dict[str, Any]) -> tuple[Table, ...]:
    """Matrices by layer and head, G_LM first; then entries by layer, and attention."""
    outputs = numbers["outputs"]
    tables = []
    for name in [name for name in ("G_LM", "A_LM", "A_P", "A") if name in outputs]:
        values = dict(outputs[name]["mean_tensor"])
        columns = dict(MATRIX_COLUMNS)
        rows = outputs[name]["of_rows"]
        if numbers["rows"]:
            values["rank_of_rows"] = rows["rank_0.001"]["mean"]
            columns["rank_of_rows"] = "rank at 1e-3, mean over rows"
        if "dag_loss" in rows:
            values["dag_loss"] = rows["dag_loss"]["mean"]
            columns["dag_loss"] = "DAG loss"
        what = f"mean over {numbers['rows']} rows" if numbers["rows"] else "predefined"
        tables.append(_by_head(f"{name}, {what}", values, columns))
    entries = {name: output["entries"] for name, output in outputs.items()}
    title = "Entries of the deductive outputs, and of the learned powers P and couplings a"
    tables.append(_by_layer(title, entries | numbers["parameters"]))
    tables.append(_by_head("Attention of one prompt", numbers["attention"], ATTENTION_COLUMNS))
    return tuple(tables)


def _by_head(title: str, values: dict[str, Any], columns: dict[str, str]) -> Table:
    arrays = {name: np.array(values[name]) for name in columns}
    layers, heads = next(iter(arrays.values())).shape
    rows: list[tuple[Cell, ...]] = []
    if layers * heads <= HEADS_IN_A_TABLE:
        for layer in range(layers):
            for head in range(heads):
                rows.append((layer, head, *(x[layer, head].item() for x in arrays.values())))
        return Table(title, ("layer", "head", *columns.values()), tuple(rows))
    for layer in range(layers):
        rows.append((layer, *(_spread(x[layer]) for x in arrays.values())))
    title = f"{title}: smallest / median / largest of the {heads} heads"
    return Table(title, ("layer", *columns.values()), tuple(rows))


def _by_layer(title: str, entries: dict[str, Any]) -> Table:
    rows = [
        (name, layer, *(results[column][layer] for column in ENTRY_COLUMNS))
        for name, results in entries.items()
        for layer in range(len(results["mean"]))
    ]
    return Table(title, ("", "layer", *ENTRY_COLUMNS.values()), tuple(rows))


def _spread(x_N: np.ndarray) -> str:
    return " / ".join(f"{value:.3g}" for value in (x_N.min(), np.median(x_N), x_N.max()))
