"""How the kernels are compiled."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from numba import njit

compiled = njit(nogil=True, error_model="numpy")
# For what only calls others, block by block: a call that hands on a dozen arrays costs as much as a loop over a block.
inlined = njit(nogil=True, error_model="numpy", inline="always")
# Sums that only the report shows may be taken in any order.
compiled_sums = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
