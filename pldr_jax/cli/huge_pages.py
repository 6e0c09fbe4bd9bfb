"""Huge memory pages for arrays on a CPU.

XLA's CPU backend asks the C library anew for the temporaries of every step, gigabytes of them,
and gives them back after it: with pages of 4 KiB, a training step spends a quarter of its time in
the kernel, mapping and clearing them. glibc (2.35 on) asks for pages of 2 MiB when the variable
`GLIBC_TUNABLES` says so, and reads that variable only when a process starts.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
"""The environment variable, and the tunable in it; 1 is `madvise`, 0 leaves pages small."""

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SINCE = (2, 35)


def environment_with_huge_pages(
    environment: Mapping[str, str], libc: str, setting: str
) -> dict[str, str] | None:
    """The environment in which a process has huge pages; None where nothing has to change.

    That is where the variable already decides about it, the C library knows no such tunable, or
    the kernel does not leave the choice to the program.

    Args:
      environment: of this process.
      libc: name and version of the C library, such as "glibc 2.36".
      setting: of the kernel, such as "always [madvise] never".
    """
    given = environment.get(VARIABLE, "")
    name, _, version = libc.partition(" ")
    if TUNABLE in given or name != "glibc" or "[madvise]" not in setting:
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < _SINCE:
        return None
    tunables = [part for part in (given, f"{TUNABLE}=1") if part]
    return {**environment, VARIABLE: ":".join(tunables)}


def use_huge_pages() -> None:
    """Starts this program anew, as the same process, with huge pages if it has none and can.

    To be called before anything is done that cannot be done twice. `GLIBC_TUNABLES=
    glibc.malloc.hugetlb=0` keeps pages small.
    """
    try:
        libc, setting = os.confstr("CS_GNU_LIBC_VERSION") or "", _SETTING.read_text()
    except (OSError, ValueError, AttributeError):  # not Linux, or another C library
        return
    environment = environment_with_huge_pages(os.environ, libc, setting)
    if environment is None or not sys.executable:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
