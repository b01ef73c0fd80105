"""One query run for real, its wall time and its bytes by the ten parts of `tts_kernels.cost`, beside their ceilings.

clock    seconds of nested ranges, each without what is inside of it
meter    what the ops of a query move and compute, and which part their seconds belong to
ways     the same query three ways: stock copies, paged without shared reads, ours
report   measured beside modelled; what has to be equal
command  `tts-kernels profile`
"""
