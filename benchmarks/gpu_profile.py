"""Where the time of a compiled step goes: kernels of a trace, by name and by part of the model, and
what its HLO consists of.
"""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

Kernel = dict[str, Any]

PARTS = (
    ("optimizer", "optimizer"),
    ("power_law", "plga power law"),
    ("residual", "plga residual layers"),
    ("metric_learner", "plga Q^T Q and norm"),
    ("/head", "head"),
    ("embedding", "embedding"),
    ("ffn_norm", "norms"),
    ("attention_norm", "norms"),
    ("ffn", "feed-forward"),
    ("attention/out", "projections"),
    ("attention/q/", "projections"),
    ("attention/k/", "projections"),
    ("attention/v/", "projections"),
    ("attention", "attention, metric, RoPE"),
)
"""What a name in the program contains -> part of the model; the first that fits."""

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_KIND = re.compile(r'"kind":"([^"]*)"')


def part_of(name: str) -> str:
    """The part of the model that an `op_name` belongs to, and the pass."""
    part = next((part for word, part in PARTS if word in name), "loss and other")
    if "rematted" in name:
        return f"{part} (again)"
    return f"{part} (backward)" if "transpose(" in name else part


def op_names(hlo: str) -> dict[str, str]:
    """Name of an instruction, dots as underscores -> its `op_name`."""
    names = {}
    for line in hlo.splitlines():
        found, name = _INSTRUCTION.match(line), _NAME.search(line)
        if found and name:
            names[re.sub(r"[.\-]", "_", found[1])] = name[1]
    return names


def traced_kernels(call: Callable[[], Any], calls: int = 3) -> list[Kernel]:
    """Name, instruction and microseconds of every kernel that the device ran in `calls` calls.

    Raises:
      RuntimeError: the trace shows none.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        events = []
        for path in Path(folder).rglob("*.trace.json.gz"):
            events += json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    lanes = {
        (e["name"], e["pid"], e.get("tid")): e["args"]["name"]
        for e in events
        if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name")
    }
    kernels = [
        {
            "name": e["name"],
            "op": e.get("args", {}).get("hlo_op", ""),
            "us": e["dur"] / calls,
        }
        for e in events
        if e.get("ph") == "X" and _runs_kernels(lanes, e)
    ]
    if not kernels:
        raise RuntimeError(f"no kernels in the lanes {sorted(set(lanes.values()))[:40]}")
    return kernels


def _runs_kernels(lanes: dict[Any, str], event: Any) -> bool:
    """Whether an event is a kernel on a stream of a GPU, or on a CPU an instruction."""
    if jax.default_backend() == "cpu":
        return "hlo_op" in event.get("args", {})
    thread = lanes.get(("thread_name", event["pid"], event.get("tid")), "")
    process = lanes.get(("process_name", event["pid"], None)) or next(
        (
            lane
            for (kind, pid, _), lane in lanes.items()
            if kind == "process_name" and pid == event["pid"]
        ),
        "",
    )
    return "CPU" not in process and thread.startswith("Stream")


def kernel_tables(kernels: list[Kernel], hlo: str) -> str:
    """The largest kernels and the parts of the model, milliseconds a step."""
    names = op_names(hlo)
    by_kernel: dict[str, list[float]] = collections.defaultdict(list)
    by_part: dict[str, list[float]] = collections.defaultdict(list)
    by_op: dict[str, list[float]] = collections.defaultdict(list)
    example: dict[str, str] = {}
    for kernel in kernels:
        key = re.sub(r"[.\-]", "_", kernel["op"] or kernel["name"])
        name = names.get(key, "")
        by_kernel[kernel["name"]].append(kernel["us"])
        by_op[f"{kernel['op'] or '?'} | {kernel['name'][:60]} | {name[-150:]}"].append(kernel["us"])
        by_part[part_of(name) if name else "not attributed"].append(kernel["us"])
        example.setdefault(kernel["name"], name)
    total = sum(kernel["us"] for kernel in kernels) / 1e3
    text = f"device time {total:.3f} ms a step, {len(kernels)} kernel events\n"
    for title, groups, count in (
        ("parts", by_part, 60), ("kernels", by_kernel, 40), ("instructions", by_op, 60)
    ):  # fmt: skip
        text += f"\n{title}: ms a step, share, events\n"
        largest = sorted(groups.items(), key=lambda item: -sum(item[1]))[:count]
        for key, times in largest:
            spent = sum(times) / 1e3
            more = f"   <- {example[key][-120:]}" if title == "kernels" else ""
            text += f"{spent:9.3f} {spent / max(total, 1e-9):6.1%} {len(times):5d}  {key[:260]}"
            text += f"{more}\n"
    return text


def attributed(kernels: list[Kernel], hlo: str) -> float:
    """Share of the time of kernels whose instruction is known."""
    names = op_names(hlo)
    known = sum(k["us"] for k in kernels if re.sub(r"[.\-]", "_", k["op"] or k["name"]) in names)
    return known / max(sum(k["us"] for k in kernels), 1e-9)


def hlo_summary(hlo: str) -> str:
    """Instructions by kind, and every product by types; bodies of loops count once."""
    shapes: dict[str, str] = {}
    kinds: collections.Counter[str] = collections.Counter()
    products: collections.Counter[str] = collections.Counter()
    for line in hlo.splitlines():
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, shape, kind, rest = found.groups()
        shapes[name] = re.sub(r"\{[^}]*\}", "", shape)
        target = _TARGET.search(line)
        detail = target[1] if target else ""
        if kind == "fusion" and (backend := _KIND.search(line)):
            detail = backend[1]
        kinds[f"{kind} {detail}".strip()] += 1
        if kind in ("dot", "convolution") or target or "gemm" in detail:
            operands = [shapes.get(x, "?") for x in re.findall(r"%([\w.\-]+)", rest.split(")")[0])]
            label = _NAME.search(line)
            products[
                f"{kind} {detail}: {shapes[name]} <- {', '.join(operands)[:160]}"
                f" | {part_of(label[1]) if label else ''}"
            ] += 1
    text = "instructions by kind\n"
    text += "".join(f"{count:6d}  {key}\n" for key, count in kinds.most_common())
    text += "\nproducts and custom calls: result <- operands | part\n"
    return text + "".join(f"{count:6d}  {key}\n" for key, count in products.most_common())
