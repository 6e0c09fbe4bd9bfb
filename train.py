"""Trains a model; `python train.py --help` lists every flag."""

from pldr_jax.cli.scripts import train

if __name__ == "__main__":
    train()
