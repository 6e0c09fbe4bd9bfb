"""The evaluation harness: tasks, model arguments and settings, from files that are on the disk."""

import json
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_here
from test_evaluation import LONG, MODEL, PAIRS, g_lm, model, scorer

import pldr_jax
from pldr_jax.cli.evaluate import evaluate_main
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.evaluation.settings import read_settings
from pldr_jax.runs.folder import write_run


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The harness with a cache of its own."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("datasets"))
    pytest.importorskip("lm_eval", reason="tasks need lm-eval; pip install 'pldr_jax[eval]'")
    import pldr_jax.evaluation.harness as module

    return module


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    lm = model()
    assert lm.tokenizer is not None
    config = ExperimentConfig(model=MODEL)
    files = {"tokenizer.model": lm.tokenizer.model_bytes}
    write_run(folder, 7, lm.params, None, config_to_dict(config), files)
    return folder


def own_tasks(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Copies of the two tasks of the package, on other files."""
    folder.mkdir()
    package = Path(pldr_jax.__file__).parent / "evaluation" / "tasks"
    rows = [
        {"question": "def return", "choices": [" self", " the of value", "?"], "answer": 0},
        {"question": "list for", "choices": [" print", " in", " layer model"], "answer": 1},
        {"question": "tokens", "choices": [" if", " model", ":"], "answer": 2},
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiz = (package / "pldr_quiz.yaml").read_text()
    (folder / "quiz.yaml").write_text(
        quiz.replace("quiz.jsonl", "mine.jsonl").replace("pldr_quiz", "my_quiz")
    )
    return folder / "quiz.yaml", rows


def test_local_tasks_by_hand(
    harness: Any,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiz, rows = own_tasks(tmp_path / "tasks")
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    status, shown, error = run_here(
        capsys, evaluate_main, run_dir, f"--tasks={quiz},pldr_text", f"--output={tmp_path / 'out'}"
    )
    assert (status, error) == (0, ""), error
    assert asked == []  # runs offline
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["modes"]) == ["full", "causal"]
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in shown and "| my_quiz | acc |" in table
    package = Path(pldr_jax.__file__).parent / "evaluation" / "tasks" / "text"
    texts = [path.read_text() for path in sorted(package.glob("*.txt"))]
    for mode, found in results["modes"].items():
        right = [
            max(range(3), key=lambda k: scores[k][0]) == row["answer"]  # noqa: B023
            for row in rows
            for scores in [
                scorer(mode).loglikelihood([(row["question"], c) for c in row["choices"]])
            ]
        ]
        assert found["my_quiz"]["acc"] == pytest.approx(sum(right) / 3)
        nats = -sum(scorer(mode).loglikelihood_rolling(texts))
        n_bytes = sum(len(text.encode()) for text in texts)
        assert found["pldr_text"]["bits_per_byte"] == pytest.approx(
            nats / math.log(2) / n_bytes, rel=1e-5
        )
    apart = results["differences"]["pldr_text"]["bits_per_byte"]
    assert apart > 1e-4  # the claim "scores unchanged" does not hold for this model


def test_frozen_from_a_file_and_from_text(
    harness: Any, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "g.npz", G_LM=np.asarray(g_lm())[:, 0])
    (tmp_path / "text.txt").write_text("\n".join([LONG] * 60))
    shared = (run_dir, "--tasks=pldr_quiz", "--limit=4", "--mode=frozen")
    values = []
    for name, option in (("a", "g_file=" + str(tmp_path / "g.npz")),
                         ("b", "g_text=" + str(tmp_path / "text.txt"))):  # fmt: skip
        output = tmp_path / name
        status, _, error = run_here(
            capsys, evaluate_main, *shared, f"--{option}", f"--output={output}"
        )
        assert (status, error) == (0, ""), error
        values.append(json.loads((output / "results.json").read_text())["modes"])
    assert [list(value) for value in values] == [["frozen"], ["frozen"]]
    package = Path(pldr_jax.__file__).parent / "evaluation" / "tasks"
    rows = [json.loads(x) for x in (package / "quiz.jsonl").read_text().splitlines()[:4]]
    right = [
        np.argmax([x for x, _ in scorer("frozen").loglikelihood(
            [(row["question"], c) for c in row["choices"]])]) == row["answer"]
        for row in rows
    ]  # fmt: skip
    assert values[0]["frozen"]["pldr_quiz"]["acc"] == pytest.approx(np.mean(right))


def test_bad_commands(
    harness: Any, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    bad = tmp_path / "bad.yaml"
    quiz, _ = own_tasks(tmp_path / "tasks")
    cases = [
        (("--tasks=pldr_quiz", "--mode=fast"), "'fast' must be one of full, causal, frozen"),
        (("--tasks=pldr_quiz", "--mode=full,full"), "each once"),
        (("--tasks=pldr_quiz", "--g_file=g.npz"), "add --mode=frozen"),
        (("--tasks=pldr_quiz", "--mode=frozen"), "this model learns G_LM"),
        (("--tasks=pldr_quiz", "--mode=frozen", "--g_file=g.npz"), "--g_file = 'g.npz': no such"),
        (("--tasks=pldr_quiz,pldr_quiz",), "is there twice"),
        (("--tasks=,",), "names no task"),
        (("--tasks=nowhere.yaml",), "nowhere.yaml: cannot be read"),
        ((f"--tasks={bad}",), "is no YAML of plain values"),
        (("--tasks=pldr_quiz", "--limit=0"), "--limit=0: must be at least 1"),
        (("--tasks=pldr_quiz", "--rows=0"), "--rows=0"),
        (("--tasks=pldr_quiz", "--overlap=32"), "overlap = 32"),
        ((), "--tasks is required"),
    ]
    bad.write_text("task: !function os.getcwd\n")
    for arguments, message in cases:
        status, _, error = run_here(capsys, evaluate_main, run_dir, *arguments, f"--output={out}")
        assert status != 0 and message in error and error.count("\n") == 1, (error, message)
    (tmp_path / "tasks" / "mine.jsonl").unlink()
    status, _, error = run_here(
        capsys, evaluate_main, run_dir, f"--tasks={quiz}", f"--output={out}"
    )
    assert status != 0 and "'mine.jsonl': no such file" in error
    assert not out.exists()
    out.mkdir()
    (out / "results.json").write_text("kept")
    status, _, error = run_here(
        capsys, evaluate_main, run_dir, "--tasks=pldr_quiz", f"--output={out}"
    )
    assert status != 0 and "already holds results.json" in error
    assert (out / "results.json").read_text() == "kept"


def test_registered_model(harness: Any, run_dir: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    made = get_model("pldr_jax").create_from_arg_string(f"path={run_dir},mode=full")
    pairs = PAIRS[:2]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = made.loglikelihood(requests)
    np.testing.assert_allclose(
        [x for x, _ in found], [x for x, _ in scorer("full").loglikelihood(pairs)], atol=1e-5
    )


def test_zero_shot_suite(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness knows the group and every task of it; their data are not fetched here."""
    from pldr_jax.evaluation.task_files import find_tasks

    tasks = find_tasks("pldr_zero_shot")
    assert [(task.name, task.local) for task in tasks] == [("pldr_zero_shot", False)]
    manager = harness.TaskSet(tasks)._manager
    members = set(manager.task_index["pldr_zero_shot"].cfg["task"])
    assert len(members) == 8 and members <= set(manager.all_tasks)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)  # made once, in 8 seconds
    with pytest.raises(ConfigError, match="'no_such_task': no task of the harness"):
        harness.TaskSet([*tasks, *find_tasks("no_such_task")])


def test_without_the_harness(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, error = run_here(
        capsys, evaluate_main, run_dir, "--tasks=pldr_quiz", f"--output={tmp_path / 'out'}"
    )
    assert status != 0 and "pip install 'pldr_jax[eval]'" in error and error.count("\n") == 1


def test_data_files_stay_in_their_folder(
    harness: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pldr_jax.evaluation.task_files import find_tasks

    quiz, _ = own_tasks(tmp_path / "tasks")
    text = quiz.read_text()
    outside = tmp_path / "outside.jsonl"
    outside.write_text((tmp_path / "tasks" / "mine.jsonl").read_text())
    (tmp_path / "tasks" / "link.jsonl").symlink_to(outside)
    (tmp_path / "tasks" / "far").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "tasks" / "pipe.jsonl")
    (task,) = find_tasks(str(quiz))
    assert task.config is not None
    for name, message in (
        ("../outside.jsonl", "must be in the folder of the YAML file"),
        (str(outside), "must be in the folder of the YAML file"),
        ("~/x.jsonl", "must be in the folder of the YAML file"),
        ("[3]", "must be in the folder of the YAML file"),
        ("link.jsonl", "is a link to elsewhere"),
        ("l*.jsonl", "is a link to elsewhere"),
        ("far/outside.jsonl", "is a link to elsewhere"),
        ("pipe.jsonl", "no such file"),
    ):
        quiz.write_text(text.replace("mine.jsonl", name))
        with pytest.raises(ConfigError, match=message) as error:
            find_tasks(str(quiz))
        assert "\n" not in str(error.value)
    for content in ("[" * 5000, "task: a\ndataset_kwargs: 3\n", "\x00"):
        quiz.write_text(content)
        with pytest.raises(ConfigError, match="--tasks: "):
            find_tasks(str(quiz))


def test_model_arguments_of_the_harness(harness: Any, run_dir: Path) -> None:
    for arguments, message in (
        (f"path={run_dir},mdoe=full", "mdoe = 'full': there is none of this name"),
        (f"path={run_dir},rows=4", "rows = 4: there is none"),
        ("mode=full", "path: is missing"),
        (f"path={run_dir},batch_size=many", "batch_size = 'many'"),
        (f"path={run_dir},overlap=0", "overlap = 0"),
        (f"path={run_dir},mode=fast", "mode = 'fast'"),
    ):
        with pytest.raises(ConfigError, match=message):
            harness.HarnessModel.create_from_arg_string(arguments, {"device": "cpu"})


def test_settings_of_the_harness() -> None:
    def read(**settings: Any) -> Any:
        return read_settings(settings)

    assert read().new_tokens == 256 and read().until == ()
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert read(**{name: 7}).new_tokens == 7
    assert read(max_new_tokens=9, max_gen_toks=5).new_tokens == 5
    assert read(max_gen_toks=0, max_tokens=None).new_tokens == 0
    greedy = {"repetition_penalty": 1.0}
    for settings in (
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.5},
        {"temperature": 0},
        {"num_beams": 1, "do_sample": None},
    ):
        assert read(**settings).sampling == greedy
    drawn = read(do_sample=True, top_k=5, until="x")
    assert drawn.sampling == greedy | {"temperature": 1.0, "top_k": 5} and drawn.until == ("x",)
    assert read(temperature="0.5").sampling["temperature"] == 0.5
    for settings, message in (
        ({"num_beams": 4}, "num_beams = 4: there is no beam search"),
        ({"max_gen_tok": 4}, "max_gen_tok = 4: no such setting; there are .*max_gen_toks"),
        ({"max_length": 4}, "max_length = 4: no such setting"),
        ({"max_tokens": -1}, "must be at least 0"),
        ({"max_gen_toks": "many"}, "max_gen_toks = 'many': must be a number"),
        ({"temperature": "hot"}, "temperature = 'hot': must be a number"),
        ({"max_gen_toks": 1.9}, "max_gen_toks = 1.9: must be a number, a whole one"),
        ({"max_tokens": True}, "max_tokens = True: must be a number"),
        ({"do_sample": True, "temperature": math.nan}, "temperature = nan: must be a number"),
        ({"temperature": -1}, "temperature = -1.0: must be at least 0"),
        ({"do_sample": "false"}, "do_sample = 'false': must be true or false"),
        ({"until": 3}, "until = 3: must be a string or a list of strings"),
        ({"until": ["a", None]}, "until = "),
    ):
        with pytest.raises(ConfigError, match=message):
            read(**settings)
