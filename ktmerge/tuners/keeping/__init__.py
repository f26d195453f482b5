"""Full tuning that keeps an eye on the base: what pulls towards it, replays, distils, stops in time, or averages.

`pull` is L2-SP and EWC, `replay` mixes upstream samples into batches, `distil` learns from the frozen base, `guard`
stops when the upstream loss has risen too far, `average` keeps the mean of the weights along the run.
Importing it loads no torch.
"""
