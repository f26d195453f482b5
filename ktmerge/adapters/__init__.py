"""Adapters as live modules: ktmerge's own, and those a folder holds, attached to a loaded model.

Importing it loads neither torch nor transformers.
"""
