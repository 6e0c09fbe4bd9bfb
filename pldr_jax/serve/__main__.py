"""`python -m pldr_jax.serve`: the same as `pldr-serve`."""

from pldr_jax.cli.scripts import serve

if __name__ == "__main__":
    serve()
