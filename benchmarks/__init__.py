"""Figures of this project on the machine at hand, with baselines beside them in the same run. Not
part of the wheel.

`python -m benchmarks.load --help`; load, reshard, registry, scale, gateway, fanout, gpu and peers
are such programs.
"""
