"""Trains a model; `python train.py --help` lists every flag."""

from pldr_jax.cli.train import main

if __name__ == "__main__":
    main()
