"""Whatever a line of JSONL, a manifest or a record of metrics holds: a value or one line."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from fuzz import check_line, fuzzed, listing
from hypothesis import given
from hypothesis import strategies as st

from pldr_jax.config import ConfigError, ModelConfig, SamplingConfig
from pldr_jax.inference.jobs import KEYS, BadLine, Job, JsonlWriter, read_prompts
from pldr_jax.inference.request import Request, check_request
from pldr_jax.runs.checksums import complete_steps, find_damage, read_manifest, write_manifest
from pldr_jax.runs.metrics import MetricsError, MetricWriter, read_metrics

CONTEXT = ModelConfig(vocab_size=300, context_length=32)

NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([10**400, -1, 0, 2**31, 2**32, 2**63, 1e308, 1e-320, True]),
)
VALUES = st.recursive(
    st.none() | NUMBERS | st.text(max_size=6) | st.sampled_from(["../../x", "\0", "\x1b[2J"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
ENTRIES = st.fixed_dictionaries(
    {}, optional={key: VALUES for key in (*KEYS, "stop_strings", "extra")}
) | st.fixed_dictionaries(
    {"tokens": st.sampled_from([0, 1, 31, 32, 33]).map(lambda n: [5] * n)},
    optional={key: NUMBERS | st.lists(NUMBERS, max_size=2) for key in KEYS[3:]},
)
SPOILED = st.sampled_from([b"\xff", b"\xef\xbb\xbf", b"[" * 5000, b"{", b"\0\0", b"\r", b"NaN"])


def spoil(text: str, junk: bytes, at: int) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return raw[: at % (len(raw) + 1)] + junk + raw[at % (len(raw) + 1) :]


LINES = st.one_of(
    ENTRIES.map(json.dumps).map(str.encode),
    st.builds(spoil, ENTRIES.map(json.dumps), SPOILED, st.integers(0, 200)),
    st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"")),
    st.sampled_from([b'{"tokens": ' + b"[" * 5000, b"[" * 5000, b'{"id": 1, "tokens": [5]}']),
)


@given(lines=st.lists(LINES, max_size=6))
@fuzzed
def test_every_line_of_prompts_is_a_request_or_a_reason(lines: list[bytes]) -> None:
    source = io.BytesIO(b'{"tokens": [5], "id": "first"}\n' + b"\n".join(lines))
    jobs = list(read_prompts(source="-", stdin=source))
    assert len(jobs) == 1 + sum(bool(line.strip()) for line in lines)
    assert jobs[0] == Job("first", [5])
    for job in jobs:
        if isinstance(job, BadLine):
            check_line(f"{job.number}: {job.reason}")
            continue
        sampling = SamplingConfig(**job.settings).of_prompt(job.index)
        assert len(job.digest(sampling)) == 16
        if isinstance(job.prompt, list):
            reason = check_request(Request(tuple(job.prompt), sampling), CONTEXT, pieces=300)
            fits = 0 < len(job.prompt) < 32 and all(0 <= token < 300 for token in job.prompt)
            assert reason is not None or fits
            if reason is not None:
                check_line(reason)


RESULT = b'{"id": 1, "line": 1, "finish_reason": "stop"}'


@given(
    results=st.lists(LINES | st.just(RESULT), max_size=3),
    tail=st.binary(max_size=9) | st.just(b'{"i') | st.just(b"\0\0"),
)
@fuzzed
def test_an_output_of_any_bytes_goes_on_whole_or_is_refused(
    tmp_path: Path, results: list[bytes], tail: bytes
) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in results) + tail)
    before = path.read_bytes()
    try:
        with JsonlWriter(path, resume=True) as writer:
            writer.write({"id": "new", "text": "x"})
    except ConfigError as error:
        check_line(str(error))
        assert path.read_bytes() == before
        return
    assert json.loads(path.read_bytes().splitlines()[-1])["id"] == "new"


@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["train/loss", "x"]), NUMBERS | st.just(10**400) | VALUES
        ).map(lambda row: {"step": 2} | row)
        | VALUES,
        max_size=4,
    ),
    junk=SPOILED,
    at=st.integers(0, 300),
    spoiled=st.booleans(),
)
@fuzzed
def test_a_record_of_metrics_is_rows_or_one_line(
    tmp_path: Path, rows: list[Any], junk: bytes, at: int, spoiled: bool
) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1, "time": 1.0, "train/loss": 2.0}\n' + "".join(
        json.dumps(row) + "\n" for row in rows
    )
    path.write_bytes(spoil(text, junk, at) if spoiled else text.encode())
    before = path.read_bytes()
    try:
        read = read_metrics(path)
    except MetricsError as error:
        check_line(str(error))
        with pytest.raises(MetricsError), MetricWriter(tmp_path, False, resume_step=5):
            pass
        assert path.read_bytes() == before
        return
    assert all(isinstance(float(x or 0), float) for row in read for x in row.values())
    with MetricWriter(tmp_path, False, resume_step=2**64) as writer:
        writer.write(7, {"train/loss": 1.0})
    assert repr(read_metrics(path)[:-1]) == repr(read)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for item in ("state", "data", "config"):
        (folder / "3" / item).mkdir(parents=True)
        (folder / "3" / item / "bytes").write_bytes(item.encode() * 20)
    return folder


MANIFESTS = st.dictionaries(
    st.sampled_from(["state/bytes", "../../x", "/etc/passwd", "", "\0", "state"])
    | st.text(max_size=4),
    st.lists(NUMBERS, max_size=3) | VALUES,
    max_size=3,
).map(lambda entries: json.dumps(entries).encode())


@given(content=MANIFESTS | st.binary(max_size=60) | SPOILED)
@fuzzed
def test_a_manifest_vouches_for_nothing_that_it_does_not_name_exactly(
    checkpoint: Path, content: bytes
) -> None:
    before = listing(checkpoint / "3")
    write_manifest(checkpoint, 3)
    (checkpoint / "manifests" / "3.json").write_bytes(content)
    manifest, damage = read_manifest(checkpoint, 3), find_damage(checkpoint, 3)
    assert manifest is None or damage is not None  # no random manifest describes the files
    if damage is not None:
        check_line(damage)
    assert complete_steps(checkpoint) == [3] and listing(checkpoint / "3") == before


@given(
    values=st.lists(
        st.dictionaries(
            st.sampled_from(["train/loss", "eval/loss", "eval/order_rms/G_LM", "x"]),
            st.floats() | st.integers(-(2**63), 2**63),
        ),
        min_size=1,
        max_size=3,
    )
)
@fuzzed
def test_what_was_recorded_is_read(tmp_path: Path, values: list[dict[str, Any]]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    with MetricWriter(tmp_path, False, resume_step=None) as writer:
        for step, row in enumerate(values):
            writer.write(step, row)
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(len(values)))
