"""From GPU to GPU of one host, beside what else moves the same bytes.

`run.py` says what is measured.
"""
