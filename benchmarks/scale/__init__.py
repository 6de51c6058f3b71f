"""What the registry costs etcd and its clients as ranks, instances and joiners grow in number.

`python -m benchmarks.scale --help`. Counts come from the metrics of a real etcd. They do not depend
on how busy the machine is; the seconds of CPU hardly do.
"""
