"""`make gpu`: everything that a GPU can show, in stages; see benchmarks/README.md."""
