"""The programs: `train.py` and `infer.py` at the root of the repository, `pldr-train` and
`pldr-infer` when installed.
"""
