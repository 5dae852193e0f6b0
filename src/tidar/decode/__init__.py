"""Decoding: the reference (the specification), the engine (cached, batched), and the plan that paces it."""
