"""What is in a checkpoint, and how far tuned models moved from it: to look at before blending.

Headers alone need neither numpy nor numba; the rest is one streaming pass.
"""
