"""Speed of tts_kernels beside its peers, measured in one run: `make bench`."""
