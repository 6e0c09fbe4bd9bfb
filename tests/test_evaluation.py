"""Benchmarks: requests answered as the model's own logits say, whatever the batch; local tasks."""

import functools
import json
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import WORDS, run_here

import pldr_jax
from pldr_jax.api import LanguageModel
from pldr_jax.cli.evaluate import evaluate_main
from pldr_jax.config import ConfigError, ExperimentConfig, ModelConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.evaluation.report import as_metrics, differences, results_json, results_table
from pldr_jax.evaluation.scorer import TextScorer
from pldr_jax.evaluation.settings import read_settings
from pldr_jax.evaluation.windows import rolling_windows
from pldr_jax.inference.decode import prompt_g_lm
from pldr_jax.interop.names import to_tensors
from pldr_jax.interop.reference import reference_logits
from pldr_jax.model.decoder import init_params
from pldr_jax.runs.folder import write_run

MODEL = ModelConfig(
    vocab_size=300,
    num_layers=1,
    num_heads=2,
    head_dim=8,
    ffn_dim=24,
    metric_dim=12,
    num_residual_layers=1,
    num_gated_units=1,
    context_length=32,
    unroll=False,
)
MODES = ("full", "causal", "frozen")


@functools.cache
def model() -> LanguageModel:
    """Its G_LM depends on its input."""
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(1)))
    plga = params["layers"]["attention"]["plga"]
    plga["a"], plga["P"] = 20 * plga["a"], 5 * plga["P"]
    text = " ".join(WORDS * 40) + "\nabcdefghijklmnopqrstuvwxyz?:.\n" * 9
    return LanguageModel(MODEL, params, tokenizer=Tokenizer.train([text], 300))


@functools.cache
def g_lm() -> jax.Array:
    return model()([[7, 8, 9, 10, 11]]).deductive.G_LM


def scorer(mode: Any, rows: int = 8, **options: Any) -> TextScorer:
    given = g_lm() if mode == "frozen" else None
    return TextScorer(model(), mode, rows, given, **options)


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    return to_tensors(MODEL, model().params)


@functools.cache
def g_lm_of_tokens() -> Any:
    return jax.jit(functools.partial(prompt_g_lm, MODEL, model().params))


def by_hand(mode: str, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """From the logits of one forward pass over all tokens but the last, in NumPy."""
    tokens = [*context, *continuation][:-1]
    g = np.asarray(g_lm())
    if mode != "frozen":
        read = tokens if mode == "full" else context
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(read)] = read
        g = np.asarray(g_lm_of_tokens()(padded, np.array([len(read)])))
    logits = reference_logits(MODEL, tensors(), np.array(tokens), g[:, 0])[len(context) - 1 :]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = logprobs[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((logits.argmax(-1) == continuation).all())


LONG = " ".join(WORDS * 3)
PAIRS = [
    ("def return", " self"),
    ("", "of value"),
    ("list for in", " if else print range"),
    (LONG, " model"),
    ("print", ""),
    ("tokens ", "model layer"),
]


# Windows


def test_windows_predict_every_token_once() -> None:
    for length in range(40):
        tokens = list(range(100, 100 + length))
        for context_length, overlap in ((2, 1), (8, 1), (8, 3), (8, 7), (16, 4)):
            windows = list(rolling_windows(tokens, 3, context_length, overlap))
            assert [t for _, scored in windows for t in scored] == tokens
            for i, (context, scored) in enumerate(windows):
                first = scored[0] - 100
                assert len(context) + len(scored) <= context_length + 1 and scored
                assert list(context) == ([3] if i == 0 else tokens[first - len(context) : first])
                assert i == 0 or len(context) >= overlap
            if len(windows) > 1:
                assert len(windows[-1][0]) + len(windows[-1][1]) == context_length + 1
    with pytest.raises(ValueError, match="overlap"):
        list(rolling_windows([1], 3, 8, 8))


def test_windows_are_those_of_the_harness() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for length in range(40):
        tokens = list(range(100, 100 + length))
        for context_length, overlap in ((2, 1), (8, 1), (8, 3), (16, 4)):
            theirs = utils.get_rolling_token_windows(tokens, 3, context_length, overlap)
            expected = [tuple(map(list, utils.make_disjoint_window(pair))) for pair in theirs]
            assert list(rolling_windows(tokens, 3, context_length, overlap)) == expected


# Requests


@pytest.mark.parametrize("mode", MODES)
def test_loglikelihood_is_that_of_the_logits(mode: str) -> None:
    found = scorer(mode).loglikelihood(PAIRS)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        if not continuation:
            assert (logprob, greedy) == (0.0, True)
            continue
        before, after = model().encode_pair(context, continuation)
        before = (before or [3])[-(33 - len(after)) :]
        expected, is_greedy = by_hand(mode, before, after)
        assert logprob == pytest.approx(expected, abs=2e-5), context
        assert greedy == is_greedy
    assert len(model().encode(LONG)) > 32


def test_the_modes_differ_where_g_lm_depends_on_its_input() -> None:
    full, causal, frozen = ([x for x, _ in scorer(mode).loglikelihood(PAIRS)] for mode in MODES)
    assert max(abs(a - b) for a, b in zip(full, causal, strict=True)) > 1e-2
    assert max(abs(a - b) for a, b in zip(causal, frozen, strict=True)) > 1e-2


def test_scores_are_unchanged_by_caching_where_g_lm_is_invariant() -> None:
    """With a = 0, G_LM is b_a for every text."""
    params = jax.tree.map(lambda leaf: leaf, model().params)
    plga = params["layers"]["attention"]["plga"]
    plga["a"], plga["b_a"] = 0 * plga["a"], jax.random.normal(jax.random.key(2), plga["a"].shape)
    lm = LanguageModel(MODEL, params, tokenizer=model().tokenizer)
    full, causal = (TextScorer(lm, mode).loglikelihood(PAIRS) for mode in ("full", "causal"))
    np.testing.assert_allclose([x for x, _ in full], [x for x, _ in causal], atol=1e-5)
    assert full[0][0] != pytest.approx(scorer("full").loglikelihood(PAIRS[:1])[0][0], abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_rolling(mode: str) -> None:
    texts = [LONG, "def", "", " ".join(WORDS)]
    found = scorer(mode, overlap=4).loglikelihood_rolling(texts)
    for text, total in zip(texts, found, strict=True):
        windows = list(rolling_windows(model().encode(text), 3, 32, 4))
        expected = sum(by_hand(mode, list(c), list(x))[0] for c, x in windows)
        assert total == pytest.approx(expected, abs=1e-4)
    assert found[2] == 0 and found[0] < found[3] < found[1] < 0


@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_the_batch_size(mode: str) -> None:
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(WORDS, n)) for n in (1, 3, 4, 6, 9, 2, 7, 5, 12, 3)]
    pairs = [(text, " model layer") for text in words] + PAIRS
    texts = [*words, LONG]
    results = []
    for rows in (1, 4, 16):
        one = scorer(mode, rows)
        results.append((one.loglikelihood(pairs), one.loglikelihood_rolling(texts)))
    for scores, totals in results[1:]:
        np.testing.assert_allclose(
            [x for x, _ in scores], [x for x, _ in results[0][0]], rtol=0, atol=1e-5
        )
        assert [g for _, g in scores] == [g for _, g in results[0][0]]
        np.testing.assert_allclose(totals, results[0][1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_generate_until(mode: str) -> None:
    settings = {"max_gen_toks": 6, "until": ["\n\n"]}
    contexts = ["def return", "", "list for in if"]
    requests = [(context, settings) for context in contexts]
    found = [scorer(mode, rows).generate_until(requests) for rows in (1, 4, 16)]
    assert found[0] == found[1] == found[2]
    cache = {"kv_cache": False, "g_cache": "none"} if mode == "full" else {}
    for context, text in zip(contexts, found[0], strict=True):
        prompt = (model().encode(context) or [3])[-26:]
        (made,) = model().generate(prompt, 6, stop=["\n\n"], **cache)
        assert text == made.text


def test_generation_settings() -> None:
    (text,) = scorer("causal").generate_until([("def", {"max_gen_toks": 8})])
    assert len(text) > 3
    stop = text[2]
    (cut,) = scorer("causal").generate_until([("def", {"max_gen_toks": 8, "until": stop})])
    assert cut == text[: text.index(stop)]
    # Half of the context at most; what is too long loses its beginning.
    (long,) = scorer("causal").generate_until([(LONG, {"until": []})])
    kept = model().encode(LONG)[-16:]
    assert long == model().generate(kept, 16)[0].text
    drawn = {"max_gen_toks": 8, "do_sample": True, "temperature": 5.0, "top_k": 200}
    (one,) = scorer("causal").generate_until([("def", drawn)])
    assert one != text and [one] == scorer("causal").generate_until([("def", drawn)])
    greedy = {"max_gen_toks": 8, "do_sample": False, "temperature": 5.0, "top_p": 0.5}
    assert scorer("causal").generate_until([("def", greedy)]) == [text]
    assert scorer("causal").generate_until([("def", {"max_gen_toks": 8, "temperature": 0})]) == [
        text
    ]
    no_draw = {"max_gen_toks": 8, "do_sample": True, "temperature": 0.0}
    assert scorer("causal").generate_until([("def", no_draw)]) == [text]
    with pytest.raises(ConfigError, match=r"^request 0: top_p = 2.0: must be at most 1"):
        scorer("causal").generate_until([("def", {**drawn, "top_p": 2.0})])
    with pytest.raises(ConfigError, match=r"^request 0: beams = 2: no such setting"):
        scorer("causal").generate_until([("def", {"beams": 2})])


def test_no_new_tokens_and_other_names_of_their_number() -> None:
    eight, other = ("def", {"max_gen_toks": 8}), ("def", {"max_new_tokens": 8, "num_beams": 1})
    nothing = ("def", {"max_gen_toks": 0})
    text, empty, same = scorer("causal").generate_until([eight, nothing, other])
    assert text == same and text and empty == ""
    assert scorer("causal").generate_until([nothing]) == [""]
    greedy = {"max_tokens": 8, "do_sample": True, "temperature": 0.0}
    assert scorer("causal").generate_until([("def", greedy)]) == [text]
    with pytest.raises(ConfigError, match=r"^request 1: num_beams = 2: there is no beam search"):
        scorer("causal").generate_until([eight, ("def", {"num_beams": 2})])


def test_what_cannot_be_scored_is_one_line() -> None:
    lm = model()
    for message, make in {
        "mode = 'other'": lambda: TextScorer(lm, "other"),  # type: ignore[arg-type]
        "this model learns G_LM": lambda: TextScorer(lm, "frozen"),
        "a given G_LM needs 'frozen'": lambda: TextScorer(lm, "causal", g_lm=g_lm()),
        "overlap = 32: must be 1 to 31": lambda: TextScorer(lm, overlap=32),
        "no tokenizer.model": lambda: TextScorer(LanguageModel(MODEL, lm.params)),
        "the continuation has .* tokens": lambda: scorer("full").loglikelihood([("a", LONG)]),
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


# Results


def test_report() -> None:
    one = {"quiz": {"acc": 0.5, "acc_stderr": 0.1}, "text": {"ppl": 2e7}}
    other = {"quiz": {"acc": 0.75, "acc_stderr": 0.2}, "text": {"ppl": math.inf}}
    assert differences({"full": one, "causal": other})["quiz"] == {"acc": 0.25}
    table = results_table({"full": one, "causal": other}).splitlines()
    assert table[0] == "| task | metric | full | causal | difference |"
    assert table[2] == "| quiz | acc | 0.5000 ± 0.1000 | 0.7500 ± 0.2000 | 2.5e-01 |"
    assert table[3] == "| text | ppl | 2.0000e+07 | inf | inf |"
    assert "difference" not in results_table({"full": one})
    read = json.loads(results_json({"step": 3}, {"full": one, "causal": other}))
    assert read["step"] == 3 and read["modes"]["causal"]["text"]["ppl"] is None
    assert read["differences"]["quiz"]["acc"] == 0.25
    assert as_metrics(one) == {"eval/tasks/quiz/acc": 0.5, "eval/tasks/text/ppl": 2e7}


# The harness


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
        ({"do_sample": "false"}, "do_sample = 'false': must be true or false"),
        ({"until": 3}, "until = 3: must be a string or a list of strings"),
        ({"until": ["a", None]}, "until = "),
    ):
        with pytest.raises(ConfigError, match=message):
            read(**settings)
