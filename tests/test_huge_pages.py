"""Programs run with huge pages where the machine leaves the choice to them."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pldr_jax.cli import huge_pages, scripts
from pldr_jax.cli.huge_pages import TUNABLE, VARIABLE, environment_with_huge_pages

CHOICE = "always [madvise] never\n"
PROGRAM = """
import json, os, sys, types
from pldr_jax.cli.common import run
from pldr_jax.cli.scripts import start
program = types.ModuleType("pldr_jax.cli.shown")
program.main = lambda: run(
    lambda argv: print(json.dumps([argv, os.environ.get("GLIBC_TUNABLES"), os.getpid()]))
)
sys.modules[program.__name__] = program
start("shown")
"""
PROGRAMS = ("train", "infer", "freeze", "convert", "data", "evaluate", "analyze", "serve", "verify")


def test_other_tunables_and_variables_are_kept() -> None:
    environment = {"HOME": "/root", VARIABLE: "glibc.malloc.check=3"}
    changed = environment_with_huge_pages(environment, "glibc 2.35", CHOICE)
    assert changed == {"HOME": "/root", VARIABLE: f"glibc.malloc.check=3:{TUNABLE}=1"}
    assert environment_with_huge_pages({}, "glibc 2.36", CHOICE) == {VARIABLE: f"{TUNABLE}=1"}


@pytest.mark.parametrize(
    "given,libc,setting",
    [
        (f"{TUNABLE}=0", "glibc 2.36", CHOICE),
        (f"glibc.malloc.check=3:{TUNABLE}=2", "glibc 2.36", CHOICE),
        ("", "glibc 2.34", CHOICE),
        ("", "glibc 1.99", CHOICE),
        ("", "musl 1.2", CHOICE),
        ("", "", CHOICE),
        ("", "glibc 2.36", "[always] madvise never"),
        ("", "glibc 2.36", "always madvise [never]"),
    ],
)
def test_nothing_is_changed_where_it_is_decided_or_impossible(
    given: str, libc: str, setting: str
) -> None:
    assert environment_with_huge_pages({VARIABLE: given}, libc, setting) is None


@pytest.mark.parametrize("given", [None, f"{TUNABLE}=0"])
def test_a_program_starts_anew_once_with_its_arguments(tmp_path: Path, given: str | None) -> None:
    """As the same process, so that whoever started it can still signal it."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this kernel does not leave huge pages to programs")
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    if given is not None:
        environment[VARIABLE] = given
    command = [sys.executable, str(script), "--flag=a b", ""]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        out, _ = child.communicate(timeout=120)
    assert json.loads(out) == [["--flag=a b", ""], given or f"{TUNABLE}=1", child.pid]


@pytest.mark.parametrize("name", PROGRAMS)
def test_main_leaves_the_process_of_a_notebook_or_test_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Only what a shell starts begins anew: the console scripts, all of which do."""
    replaced: list[str] = []
    module = "training.train" if name == "train" else name

    def exec_(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        replaced.append(environment[VARIABLE])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", exec_)
    monkeypatch.setattr(huge_pages, "environment_with_huge_pages", lambda *_: {VARIABLE: "on"})
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    for call, expected in (
        (importlib.import_module(f"pldr_jax.cli.{module}").main, []),
        (getattr(scripts, name), ["on"]),
    ):
        with contextlib.suppress(SystemExit):
            call()
        assert replaced == expected
    capsys.readouterr()


def test_every_console_script_starts_its_program() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    targets = {target.partition(":")[2] for target in project["scripts"].values()}
    assert targets == set(PROGRAMS)
    assert all(target.startswith("pldr_jax.cli.scripts:") for target in project["scripts"].values())
