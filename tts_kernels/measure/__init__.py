"""Measuring kernels: inputs that are made on the device, timing by captured graphs, compiling ahead, tuning."""
