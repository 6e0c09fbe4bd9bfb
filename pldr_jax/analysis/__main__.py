"""`python -m pldr_jax.analysis`: the same as `pldr-analyze`."""

from pldr_jax.cli.analyze import main

if __name__ == "__main__":
    main()
