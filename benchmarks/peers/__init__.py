"""Loads beside those of other products, on one machine: `python -m benchmarks.peers`.

`candidates/` has one module for each candidate. It runs in two processes, the source's side and the
reader's (`side.py`); where the product is not in .venv, these run in .peers. So `candidates/`,
`sets.py`, `work.py` and `side.py` import nothing of this project but each other; only the modules
of candidates that are in .venv do.
"""
