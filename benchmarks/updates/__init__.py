"""`python -m benchmarks.updates`: a trainer whose weights change a little with each step, and a
reader that follows it, on this machine and between hosts with a slow link.

Each round is one step. After it, each candidate brings the reader from the step before to this one,
one after the other, in another order every round: what has changed (`load` with `base`), all of it
(`load`), a broadcast by gloo, a safetensors file over HTTP, and the XOR with the step before,
compressed, over HTTP. The time is from the call at the trainer until the reader has the weights; it
is one clock, as all runs on one machine. After each load all bytes are compared.
"""
