"""The file format: headers, names, tensor classes, parts, the atomic writer. Knows nothing about merging or tuning.

Importing it loads neither torch nor transformers.
"""
