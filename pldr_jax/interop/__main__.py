"""`python -m pldr_jax.interop`: the same as `pldr-convert`."""

from pldr_jax.cli.convert import main

if __name__ == "__main__":
    main()
