"""`pldr-verify`: whether the numbers are right on this machine."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pldr_jax.cli.common import FAILURE, STEP, keep_compiled_programs, run
from pldr_jax.cli.options import Option, parse_args
from pldr_jax.config import ConfigError
from pldr_jax.terminal import print_line

if TYPE_CHECKING:
    from pldr_jax.verify.findings import Finding

DESCRIPTION = (
    "Checks the package against numbers of the authors' implementation that it carries, on the "
    "device that is there; or a checkpoint against itself, and against its published figures where "
    "it is known. The exit status is 1 where anything is wrong."
)
OPTIONS = (
    Option(
        "checkpoint",
        "run folder, or folder in the transformers layout; without one, the package is checked",
        metavar="CHECKPOINT",
        place=True,
        default="",
    ),
    STEP,
)


def verify_main(argv: list[str]) -> None:
    """Parses the command line, checks, and prints a table.

    Raises:
      SystemExit: status 1 where something is wrong.
    """
    options = parse_args(argv, "pldr-verify", DESCRIPTION, OPTIONS, fields=())
    if options.step is not None and not options.checkpoint:
        raise ConfigError("--step: is that of a checkpoint; name one")
    keep_compiled_programs(None)
    began = time.monotonic()
    findings = list(_checkpoint(options.checkpoint, options.step) if options.checkpoint else _own())
    from pldr_jax.verify.findings import table

    print_line(table(findings))
    wrong = sum(not one.right for one in findings)
    seconds = time.monotonic() - began
    print_line(f"{len(findings)} checks, {wrong} wrong, in {seconds:.0f} s")
    if wrong:
        raise SystemExit(FAILURE)


def _device() -> str:
    import jax

    return f"{jax.devices()[0].device_kind} ({jax.default_backend()}), jax {jax.__version__}"


def _own() -> "Iterator[Finding]":
    from pldr_jax.verify.package import package_findings

    print_line(f"the package, on {_device()}")
    yield from package_findings()


def _checkpoint(path: str, step: int | None) -> "Iterator[Finding]":
    from pldr_jax.interop.weights import open_checkpoint
    from pldr_jax.verify.checkpoint import checkpoint_findings
    from pldr_jax.verify.published import published_findings, recognised

    checkpoint = open_checkpoint(path, step)
    published = recognised(checkpoint)
    known = "its weights are of no known revision" if published is None else published.name
    print_line(f"{path} ({known}), on {_device()}")
    yield from checkpoint_findings(checkpoint)
    if published is not None:
        yield from published_findings(checkpoint, published)


def main() -> None:
    """Runs the program with the arguments of this process."""
    run(verify_main)
