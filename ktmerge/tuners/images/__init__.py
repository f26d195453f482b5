"""Samples with images: where they come from, whether they can be read, and what a model's processor makes of them.

`picture` is one image, `named` what rows say of images, `check` reads all of them once, `processor` loads a model's
processor, `encode` turns samples into tokens, `collate` adds the pixels to a batch. Importing it loads no torch.
"""
