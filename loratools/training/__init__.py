"""Training of adapters: the pure functions of a step, and what is built from them."""
