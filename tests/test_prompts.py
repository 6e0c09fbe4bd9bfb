"""Prompts from arguments, text, JSONL and stdin; a bad line is named and passed over."""

import io
from pathlib import Path

import pytest
from letters import jsonl

from pldr_jax.config import ConfigError
from pldr_jax.inference.jobs import BadLine, Job, count_prompts, read_prompts


def test_prompts_and_text_files(tmp_path: Path) -> None:
    assert list(read_prompts(["a", ""])) == [Job(1, "a"), Job(2, "", index=1)]
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf{one\r\n\n  two \n \t\n\xff\nlast\xe2\x80\xa8")
    assert list(read_prompts(source=str(path))) == [
        Job(1, "{one", index=0),
        Job(3, "  two ", index=1),
        BadLine(5, "is not UTF-8"),
        Job(6, "last\u2028", index=3),
    ]
    assert count_prompts(str(path)) == 4


def test_stdin_is_text_or_jsonl() -> None:
    def read(data: bytes) -> list[Job | BadLine]:
        return list(read_prompts(source="-", stdin=io.BytesIO(data)))

    assert read(b"one\n{two\n") == [Job(1, "one"), Job(2, "{two", index=1)]
    assert read(b'\n  {"prompt": "one"}\n') == [Job(2, "one")]


def test_rows_of_settings(tmp_path: Path) -> None:
    settings = {"temperature": 1, "top_k": 3, "seed": 7, "stop": ["x"], "stop_ids": [2]}
    path = jsonl(tmp_path / "a.jsonl", {"id": "a", "prompt": "p", **settings}, {"tokens": [1, 2]})
    first, second = read_prompts(source=str(path))
    assert first == Job("a", "p", {**settings, "stop": ("x",), "stop_ids": (2,)}, 0)
    assert isinstance(first, Job) and isinstance(first.settings["temperature"], float)
    assert second == Job(2, [1, 2], {}, 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": "a", "temperature": NaN}', "NaN is no number"),
        ('["a"]', "is not an object"),
        ("{}", "either prompt or tokens"),
        ('{"prompt": "a", "tokens": [1]}', "either prompt or tokens"),
        ('{"prompt": 3}', "prompt must be a string"),
        ('{"tokens": [1, true]}', "tokens must be a list of integers"),
        ('{"tokens": "1 2"}', "tokens must be a list of integers"),
        ('{"id": null, "prompt": "a"}', "id must be"),
        ('{"id": true, "prompt": "a"}', "id must be"),
        ('{"prompt": "a", "temprature": 1}', "unknown key 'temprature'"),
        ('{"prompt": "a", "top_p": 7}', "top_p = 7.0: must be at most 1"),
        ('{"prompt": "a", "top_p": "x"}', "top_p = 'x': must be float"),
        ('{"prompt": "a", "max_new_tokens": 1.5}', "max_new_tokens = 1.5: must be int"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens = 0: must be at least 1"),
        ('{"prompt": "a", "top_k": 99999999999}', "top_k = 99999999999: must be at most"),
        ('{"prompt": "a", "seed": -1}', "seed = -1: must be at least 0"),
        ('{"prompt": "a", "temperature": 1e999}', "temperature = inf: must be finite"),
        ('{"prompt": "a", "temperature": true}', "temperature = True: must be float"),
        ('{"prompt": "a", "max_new_tokens": 1000000000000}', "max_new_tokens = 1000000000000"),
        ('{"prompt": "a", "top_k": null}', "top_k = None: must be int"),
        ('{"prompt": "a", "seed": 4294967296}', "seed = 4294967296: must be at most"),
        ('{"prompt": "a", "stop_ids": [99999999999]}', "stop_ids = (99999999999,)"),
        ('{"prompt": "a", "stop_ids": [-1]}', "stop_ids = (-1,)"),
        ('{"prompt": "a", "stop_ids": [0,1,2,3,4,5,6,7,8]}', "has 9 ids"),
        ('{"prompt": "a", "temperature": 1%s}' % ("0" * 400), "temperature = 1000"),
        ('{"prompt": "a", "stop": ["x", 1]}', "stop = ('x', 1): must be"),
        ('{"prompt": "a", "stop": [""]}', "an empty string"),
        ('{"prompt": "a", "stop_ids": [1.0]}', "stop_ids = (1.0,): must be"),
        ('{"id": "good", "prompt": "a"}', "the id 'good' was there before"),
    ],
)
def test_a_bad_row_is_named_and_passed_over(tmp_path: Path, line: str, reason: str) -> None:
    good = {"id": "good", "prompt": "a"}
    path = jsonl(tmp_path / "a.jsonl", good, "", line, {"prompt": "b"})
    first, bad, last = read_prompts(source=str(path))
    assert first == Job("good", "a") and last == Job(4, "b", index=2)
    assert isinstance(bad, BadLine) and bad.number == 3 and reason in bad.reason
    assert "\n" not in bad.reason


def test_a_missing_file_is_noticed_at_once() -> None:
    with pytest.raises(ConfigError, match="no_such.*No such file"):
        read_prompts(source="no_such.jsonl")
