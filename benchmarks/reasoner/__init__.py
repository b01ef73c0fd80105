"""A small reasoner and its verifiers, trained here: what external test-time scaling adds, measured on any machine."""
