"""`python -m pldr_jax.data`."""

from pldr_jax.cli.data import main

if __name__ == "__main__":
    main()
