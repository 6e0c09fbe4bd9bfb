"""The server under load, beside `lm.generate` on the same queue.

    python benchmarks/serve.py runs/nano                  # 1, 8 and 32 clients, Poisson arrivals
    python benchmarks/serve.py runs/nano --soak 2000      # memory, compilations, lost requests

Every client streams one request after another (closed loop), or requests arrive at random moments
(`--rate` a second). `lm.generate` decodes the same prompts, as a whole, before and after, in a
process of its own with as many slots; ratios are of tokens a second.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from typing import Any

SLOTS = 32

GENERATE = """
import json, sys, time
import pldr_jax
from pldr_jax.config import SamplingConfig
lm = pldr_jax.load(sys.argv[1])
for line in sys.stdin:
    cases = [(tuple(p), n, s) for p, n, s in json.loads(line)]
    begin = time.perf_counter()
    requests = [lm.request(p, SamplingConfig(n, temperature=1.0, seed=s, stop_ids=()))
                for p, n, s in cases]
    results = [r for _, r in lm.run(requests, batch_size=int(sys.argv[2]), steps=8,
                                    capacity=lm.config.context_length) if r.finish_reason]
    seconds = time.perf_counter() - begin
    print(sum(len(r.tokens) for r in results) / seconds, flush=True)
"""


def cases_of(count: int, context: int, rng: random.Random) -> list[tuple[list[int], int, int]]:
    """Prompts of mixed lengths, tokens to make, seeds; no piece of them ends a text."""
    cases = []
    for i in range(count):
        prompt = [rng.randint(10, 250) for _ in range(rng.randint(4, context // 2))]
        cases.append((prompt, rng.randint(8, context // 2), i))
    return cases


async def one(port: int, case: tuple[list[int], int, int], leave: bool = False) -> dict[str, Any]:
    """One streamed request: seconds to the first token and between two, tokens, whether whole."""
    prompt, count, seed = case
    body = json.dumps(
        {"prompt": prompt, "max_tokens": count, "seed": seed, "stream": True, "logprobs": 0,
         "logit_bias": {"3": -100}}
    ).encode()  # fmt: skip
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    first, tokens, whole = None, 0, False
    try:
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                whole = True
            elif line.startswith(b"data: "):
                tokens += len(json.loads(line[6:])["choices"][0]["logprobs"]["tokens"])
                first = first or time.perf_counter() - begin
                if leave:
                    break
    finally:
        writer.close()
    seconds = time.perf_counter() - begin
    later = (seconds - (first or 0)) / max(tokens - 1, 1)
    return {"first": first, "token": later, "tokens": tokens, "whole": whole, "left": leave}


async def clients(port: int, cases: list[Any], number: int, leave: float = 0.0) -> list[Any]:
    """Clients that each send one request after another."""
    waiting, rng = iter(cases), random.Random(1)
    results = []

    async def client() -> None:
        for case in waiting:
            results.append(await one(port, case, rng.random() < leave))

    await asyncio.gather(*(client() for _ in range(number)))
    return results


async def poisson(port: int, cases: list[Any], rate: float) -> list[Any]:
    """Requests at the moments of a Poisson process."""
    rng, tasks = random.Random(2), []
    for case in cases:
        tasks.append(asyncio.create_task(one(port, case)))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def metric(port: int, name: str) -> float:
    """The value of a metric of the server."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return float(next(x.split()[1] for x in text.splitlines() if x.startswith(name + " ")))


def memory(pid: int) -> int:
    """MiB in use."""
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return int(next(x.split()[1] for x in lines if x.startswith("VmRSS"))) // 1024


def percentiles(results: list[Any], name: str) -> str:
    """p50, p95 and p99 of some seconds."""
    values = sorted(r[name] for r in results if r[name] is not None)
    at = [values[min(int(q * len(values)), len(values) - 1)] for q in (0.5, 0.95, 0.99)]
    return "/".join(f"{1e3 * value:.0f}" for value in at) + " ms"


def report(label: str, results: list[Any], seconds: float, alone: float) -> None:
    """A line of the table."""
    speed = sum(r["tokens"] for r in results) / seconds
    whole = sum(r["whole"] for r in results)
    print(
        f"{label:<24} {speed:8.0f} tokens/s, {speed / alone:.2f} of generate; "
        f"p50/p95/p99 of first token {percentiles(results, 'first')}, "
        f"per token {percentiles(results, 'token')}; "
        f"{whole} of {len(results)} whole",
        flush=True,
    )


def soak(port: int, pid: int, cases: list[Any]) -> None:
    """Many requests, a tenth of whose clients leave at their first token."""
    compiled = metric(port, "pldr_compilations_total")
    for start in range(0, len(cases), 500):
        some = cases[start : start + 500]
        results = asyncio.run(clients(port, some, 32, leave=0.1))
        lost = sum(not (r["whole"] or r["left"]) for r in results)
        print(f"{start + len(some)} requests: {memory(pid)} MiB, {lost} lost", flush=True)
    while metric(port, "pldr_slots_in_use"):
        time.sleep(0.05)
    print(f"{metric(port, 'pldr_compilations_total') - compiled:.0f} compilations")


def main() -> None:
    """Starts the server and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--soak", type=int, default=0)
    options = parser.parse_args()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pldr_jax.serve", options.run, "--port", "0"]
    command += ["--batch_size", str(SLOTS), "--steps", str(options.steps)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split(":")[-1].split("/")[0])
        print(server.stdout.readline().strip(), flush=True)
        about = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"))["data"][0]
        context = about["max_model_len"]
        if options.soak:
            return soak(port, server.pid, cases_of(options.soak, context, random.Random(0)))
        generate = subprocess.Popen(
            [sys.executable, "-c", GENERATE, options.run, str(SLOTS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert generate.stdin is not None and generate.stdout is not None

        def alone(cases: list[Any]) -> float:
            generate.stdin.write(json.dumps(cases) + "\n")  # type: ignore[union-attr]
            generate.stdin.flush()  # type: ignore[union-attr]
            return float(generate.stdout.readline())  # type: ignore[union-attr]

        cases = cases_of(options.requests, context, random.Random(0))
        alone(cases)  # compiles
        for number in (1, 8, 32):
            some = cases[: max(8, options.requests * number // 32)]
            before = alone(some)
            begin = time.perf_counter()
            results = asyncio.run(clients(port, some, number))
            seconds = time.perf_counter() - begin
            report(f"{number} clients", results, seconds, (before + alone(some)) / 2)
        begin = time.perf_counter()
        results = asyncio.run(poisson(port, cases, options.rate))
        report(f"{options.rate:g} arrivals/s", results, time.perf_counter() - begin, alone(cases))
        generate.stdin.close()
    finally:
        server.terminate()
        print(f"exit status {server.wait()}")


if __name__ == "__main__":
    main()
