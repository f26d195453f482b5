"""What is in a checkpoint, and how far tuned models moved from it: to look at before blending.

Headers alone need neither numpy nor numba; the rest is one streaming pass.
"""

from ktmerge.merge.diagnostics.inspecting import inspect
from ktmerge.merge.diagnostics.inspection import Inspection
from ktmerge.merge.diagnostics.picture import heat_map, require_drawable

__all__ = ["Inspection", "heat_map", "inspect", "require_drawable"]
