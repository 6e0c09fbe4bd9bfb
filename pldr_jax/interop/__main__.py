"""`python -m pldr_jax.interop`: the same as `pldr-convert`."""

from pldr_jax.cli.scripts import convert

if __name__ == "__main__":
    convert()
