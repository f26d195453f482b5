"""One file for each method or family of stages. A new file here is found by itself; it must not import torch on top."""
