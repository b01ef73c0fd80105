"""tts_kernels inside other stacks. Each module imports its stack: import the one you need."""
