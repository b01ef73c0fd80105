"""Drop-ins for other stacks, a module each. One that works inside a stack imports it; `flashinfer` needs none."""
