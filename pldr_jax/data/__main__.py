"""`python -m pldr_jax.data`."""

from pldr_jax.cli.scripts import data

if __name__ == "__main__":
    data()
