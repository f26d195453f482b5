"""Adapters in place of the weights: attached before training, folded into dense weights after it where that can be.

Its modules import torch and peft; import them only where they are needed.
"""
