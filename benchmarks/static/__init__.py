"""What the GPU kernels compile to, for architectures whether they are here or not: `python -m benchmarks.static`.

Each kernel of each case in `cases.py` is compiled ahead of time, as the launch in the backend would compile it. From
the compiler's own output come registers, spills, shared memory, occupancy, the tensor core instructions and the widths
of the loads; `limits.json` and the rules in `limits.py` say what they may be. Nothing is run: this shows neither that a
kernel is right nor how fast it is.
"""
