"""Generates text from a checkpoint; `python infer.py --help` lists every flag."""

from pldr_jax.cli.infer import main

if __name__ == "__main__":
    main()
