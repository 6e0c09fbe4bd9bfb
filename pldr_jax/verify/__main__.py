"""`python -m pldr_jax.verify`."""

from pldr_jax.cli.scripts import verify

if __name__ == "__main__":
    verify()
