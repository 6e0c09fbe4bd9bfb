"""`python -m pldr_jax.analysis`: the same as `pldr-analyze`."""

from pldr_jax.cli.scripts import analyze

if __name__ == "__main__":
    analyze()
