"""Evaluations in words: a line for each, and a table of the last one."""

from pldr_jax.runs.curves import summary_table


def report(step: int, evaluation: dict[str, float], gap_threshold: float) -> str:
    """An evaluation in a line, and a warning where the causal gap is above the threshold."""
    text = (
        f"step {step}: held-out loss {evaluation['eval/loss']:.4f}, "
        f"{evaluation['eval/bits_per_byte']:.3f} bits a byte"
    )
    tasks = {n.removeprefix("eval/tasks/"): v for n, v in evaluation.items() if "/tasks/" in n}
    text += "".join(f", {name} {value:.4g}" for name, value in tasks.items())
    if "eval/causal_gap" not in evaluation:
        return text
    gap = evaluation["eval/causal_gap"]
    order = evaluation["eval/order_parameter/G_LM"]
    text += f", causal gap {gap:+.5f}, order parameter of G_LM {order:.1e}"
    if "eval/prefix_gap" in evaluation:
        text += f", with the G_LM of the first half {evaluation['eval/prefix_gap']:+.5f}"
    if abs(gap) > gap_threshold:
        text += (
            f"\nwarning: with G_LM of another text the loss changes by {gap:+.3f}: the model "
            "is using its future through G_LM and will not generate as well as its loss says"
        )
    return text


def summary(evaluation: dict[str, float]) -> str:
    """The last evaluation as a table, one metric a line."""

    def shown(value: float) -> str:
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"

    return summary_table({name: shown(value) for name, value in evaluation.items()})
