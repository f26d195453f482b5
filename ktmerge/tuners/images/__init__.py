"""Samples with images: where they stand, whether they can be read, and what a model's processor makes of them.

`places` puts images into their texts, `check` reads all of them once, `encode` and `suffix` turn samples into tokens,
`pixels` adds images to a batch, `agreement` holds processor and model together, `opening` finds the encoder of a model.
Importing it loads no torch.
"""
