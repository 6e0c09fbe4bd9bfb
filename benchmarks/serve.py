"""The server under load, beside `lm.generate` on the same queue.

    python benchmarks/serve.py runs/nano                  # 1, 8 and 32 clients, Poisson arrivals
    python benchmarks/serve.py runs/nano --soak 2000      # memory, compilations, lost requests

Clients stream one request after another, or requests arrive at random moments. `lm.generate`
decodes the same queue before and after, in a process of its own, with as many slots; ratios are of
tokens a second. What the server costs is the difference of its time for a token from that.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

HEAD = """\
| | first token, ms | later token, ms | tokens/s | of generate | its cost, us a token | whole |
|---|---|---|---|---|---|---|"""

Case = tuple[list[int], int, int]
"""Token ids of a prompt, tokens to make, seed."""

GENERATE = """
import json, sys, time
import pldr_jax
from pldr_jax.cli.common import keep_compiled_programs
from pldr_jax.config import SamplingConfig
keep_compiled_programs(None)
lm = pldr_jax.load(sys.argv[1])
for line in sys.stdin:
    requests = [lm.request(p, SamplingConfig(n, temperature=1.0, seed=s, stop_ids=()))
                for p, n, s in json.loads(line)]
    begin = time.perf_counter()
    made = [r for _, r in lm.run(requests, batch_size=int(sys.argv[2]), steps=int(sys.argv[3]),
                                 capacity=int(sys.argv[4])) if r.finish_reason]
    print(sum(len(r.tokens) for r in made) / (time.perf_counter() - begin), flush=True)
"""


def cases_of(count: int, context: int, rng: random.Random) -> list[Case]:
    """Requests of mixed lengths."""
    cases = []
    for i in range(count):
        prompt = [rng.randint(10, 250) for _ in range(rng.randint(4, context // 2))]
        cases.append((prompt, rng.randint(8, context // 2), i))
    return cases


async def one(port: int, case: Case, leave: bool = False) -> dict[str, Any]:
    """One streamed request: seconds to the first token and for each later one, and what came."""
    prompt, count, seed = case
    body = json.dumps(
        {"prompt": prompt, "max_tokens": count, "seed": seed, "stream": True,
         "stream_options": {"include_usage": True}, "logit_bias": {"3": -100}}
    ).encode()  # fmt: skip
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    first, last, whole = None, b"", False
    try:
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                whole = True
            elif line.startswith(b"data: "):
                first, last = first or time.perf_counter() - begin, line
                if leave:
                    break
    finally:
        writer.close()
    seconds = time.perf_counter() - begin
    tokens = json.loads(last[6:])["usage"]["completion_tokens"] if whole else 0
    later = (seconds - (first or 0.0)) / max(tokens - 1, 1)
    short = len(prompt) + count
    return {
        "first": first, "token": later, "tokens": tokens, "whole": whole, "left": leave,
        "length": short, "seconds": seconds,
    }  # fmt: skip


async def clients(port: int, cases: list[Case], number: int, leave: float = 0.0) -> list[Any]:
    """Clients that each send one request after another; a share of them leaves each stream."""
    waiting, rng = iter(cases), random.Random(1)
    results = []

    async def client() -> None:
        for case in waiting:
            results.append(await one(port, case, rng.random() < leave))

    await asyncio.gather(*(client() for _ in range(number)))
    return results


async def poisson(port: int, cases: list[Case], rate: float) -> list[Any]:
    """Requests at the moments of a Poisson process."""
    rng, tasks = random.Random(2), []
    for case in cases:
        tasks.append(asyncio.create_task(one(port, case)))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def beside_long_ones(port: int, context: int) -> tuple[float, float]:
    """Seconds that a short request takes alone, and in the middle of 256 long ones, of which most
    have to wait: one call of many texts.
    """
    short: Case = ([20, 21, 22], 1, 0)
    alone = min([(await one(port, short))["seconds"] for _ in range(5)])
    many = {"prompt": [[20]] * 256, "max_tokens": context - 2, "logit_bias": {"3": -100}}
    task = asyncio.create_task(asyncio.to_thread(ask, port, "/v1/completions", many))
    while not metric(port, "pldr_waiting"):
        await asyncio.sleep(0.01)
    beside = (await one(port, short))["seconds"]
    assert not task.done()
    await task
    return alone, beside


def ask(port: int, path: str, body: Any = None) -> Any:
    """What the server answers."""
    data = None if body is None else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, kind)
    return json.load(urllib.request.urlopen(asked))


def metric(port: int, name: str) -> float:
    """The value of a metric of the server."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return float(next(x.split()[1] for x in text.splitlines() if x.startswith(name + " ")))


def memory(pid: int) -> int:
    """MiB in use."""
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return int(next(x.split()[1] for x in lines if x.startswith("VmRSS"))) // 1024


def percentiles(results: list[Any], name: str) -> str:
    """p50, p95 and p99 of some seconds, in ms."""
    values = sorted(r[name] for r in results if r[name] is not None)
    at = [values[min(int(q * len(values)), len(values) - 1)] for q in (0.5, 0.95, 0.99)]
    return " / ".join(f"{1e3 * value:.0f}" for value in at)


def report(label: str, results: list[Any], seconds: float, alone: float | None) -> None:
    """A line of the table."""
    speed = sum(r["tokens"] for r in results) / seconds
    ratio, cost = "", ""
    if alone is not None:
        ratio, cost = f"{speed / alone:.2f}", f"{1e6 * (1 / speed - 1 / alone):.0f}"
    cells = [label, percentiles(results, "first"), percentiles(results, "token")]
    cells += [f"{speed:.0f}", ratio, cost, f"{sum(r['whole'] for r in results)} of {len(results)}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def soak(port: int, pid: int, cases: list[Case]) -> None:
    """Many requests, a tenth of whose clients leave at their first token."""
    compiled = metric(port, "pldr_compilations_total")
    for start in range(0, len(cases), 250):
        some = cases[start : start + 250]
        results = asyncio.run(clients(port, some, 32, leave=0.1))
        lost = sum(not (r["whole"] or r["left"]) for r in results)
        left = sum(r["left"] for r in results)
        done = start + len(some)
        print(f"{done} requests: {memory(pid)} MiB, {left} left, {lost} lost", flush=True)
    while metric(port, "pldr_slots_in_use"):
        time.sleep(0.05)
    print(f"{metric(port, 'pldr_compilations_total') - compiled:.0f} compilations")


@contextlib.contextmanager
def generating(
    run: str, slots: int, steps: int, capacity: int
) -> Iterator[Callable[[list[Case]], float]]:
    """`lm.generate` in a process of its own, with huge pages as the server has: requests to tokens
    a second.
    """
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    process = subprocess.Popen(
        [sys.executable, "-c", GENERATE, run, str(slots), str(steps), str(capacity)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**pages, **os.environ},
    )  # fmt: skip
    source, sink = process.stdin, process.stdout
    assert source is not None and sink is not None

    def speed(cases: list[Case]) -> float:
        source.write(json.dumps(cases) + "\n")
        source.flush()
        return float(sink.readline())

    yield speed
    source.close()
    process.wait()


def load(port: int, context: int, options: argparse.Namespace) -> None:
    """Clients, arrivals, and a short request beside long ones."""
    cases = cases_of(options.requests, context, random.Random(0))
    sizes = options.batch_size, options.steps, context
    with generating(options.run, *sizes) as alone:
        alone(cases)  # compiles
        print(HEAD)
        for number in options.clients:
            some = cases[: max(8, options.requests * number // 32)]
            for _ in range(options.rounds if number == 32 else 1):
                before = alone(some)
                begin = time.perf_counter()
                results = asyncio.run(clients(port, some, number))
                seconds = time.perf_counter() - begin
                speed = (before + alone(some)) / 2 if number == 32 else None
                report(f"{number} clients", results, seconds, speed)
        begin = time.perf_counter()
        results = asyncio.run(poisson(port, cases, options.rate))
        report(f"{options.rate:g} arrivals a second", results, time.perf_counter() - begin, None)
        alone_s, beside = asyncio.run(beside_long_ones(port, context))
        print(f"a short request: {1e3 * alone_s:.0f} ms alone, {1e3 * beside:.0f} ms beside 256")


def main() -> None:
    """Starts the server and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="at once")
    parser.add_argument("--requests", type=int, default=128, help="of 32 clients")
    parser.add_argument("--rounds", type=int, default=3, help="of 32 clients")
    parser.add_argument("--rate", type=float, default=8.0, help="arrivals a second")
    parser.add_argument("--batch_size", type=int, default=8, help="slots")
    parser.add_argument("--steps", type=int, default=4, help="of a call")
    parser.add_argument("--capacity", type=int, help="tokens of a prompt and its answer")
    parser.add_argument("--soak", type=int, default=0, help="only so many requests")
    options = parser.parse_args()
    command = [sys.executable, "-m", "pldr_jax.serve", options.run, "--port", "0"]
    command += ["--batch_size", str(options.batch_size), "--steps", str(options.steps)]
    if options.capacity:
        command += ["--capacity", str(options.capacity)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split(":")[-1].split("/")[0])
        print(server.stdout.readline().strip(), flush=True)
        context = ask(port, "/v1/models")["data"][0]["max_model_len"]
        if options.soak:
            soak(port, server.pid, cases_of(options.soak, context, random.Random(0)))
        else:
            load(port, context, options)
    finally:
        server.terminate()
        print(f"exit status {server.wait()}")


if __name__ == "__main__":
    main()
