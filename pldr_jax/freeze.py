"""`python -m pldr_jax.freeze`: the same as `pldr-freeze`."""

from pldr_jax.cli.scripts import freeze

if __name__ == "__main__":
    freeze()
