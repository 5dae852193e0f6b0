"""The laws of exact decoding, checked on a user's own checkpoint.

What is expected comes from plain causal passes without cache, mask rows or engine; what is tested
is the decoder as it runs in use.
"""
