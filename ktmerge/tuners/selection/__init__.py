"""Iterative selective tuning: which elements of the trained tensors move, chosen while training, exactly so many.

`boundary` finds the exact k largest scores, `criteria` makes scores, `halves` chooses whole maps, `compact` has the
optimizer see only what is chosen, `selection` brings them together, `store` keeps masks, `chart` draws them.
Importing it loads no torch.
"""
