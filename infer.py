"""Generates text from a checkpoint; `python infer.py --help` lists every flag."""

from pldr_jax.cli.scripts import infer

if __name__ == "__main__":
    infer()
