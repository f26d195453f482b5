"""The numbers by which the compiled kernels and their callers understand each other."""

from __future__ import annotations

BLOCK = 1056
"""Elements worked on at a time: a dozen arrays of them stay in the processor's first caches. A multiple of 32, so that
loops over vectors leave no rest; no power of two, as arrays side by side would all want the same few places there."""

WINDOW = 32 * BLOCK
"""Elements read from files at a time: those of base and a few experts stay in the processor's second cache."""

NOTHING, TRIM, DROP = 0, 1, 2
SUM, LARGEST, ELECT_MEAN, ELECT_SUM, ELECT_LARGEST = 0, 1, 2, 3, 4
MOST = 4
"""Experts whose election has a loop of its own."""
GIVEN = 5
"""The merged delta is there already."""
CONSENSUS, OVERLAP, STITCH, TRUST, INFORMED, SENSITIVITY = 0, 1, 2, 3, 4, 5
"""Rules, and what some of them have to know of every element first."""
BF16, F16, F32 = 0, 1, 2
FINE, INPUT_NOT_FINITE, OVERFLOW, UNREADABLE = 0, 1, 2, 3

DIGITS, DIGIT = 6, 11
"""Digits, and bits of each, of the keys by which ranks are found."""

COLUMNS = 18
"""Of a piece in the table of `ktmerge.merge.kernels.multi_tensor`: types of base and expert, that which is rounded to,
and that which is written; first elements of base, expert and output, as addresses divided by their widths; how many;
the index of the first in its tensor; the first element of a merged delta, or 0, and else least magnitude pattern that
is kept, least hash of those that have just that, and key of the hash; whether rounding is stochastic, and its key; the
first inexact place (see `ktmerge.merge.inexact`) as its address divided by eight, how many, and the first of the
experts' values there."""

STRIP = 256
"""Elements of a piece that are written together: of longer ones the processor's buffers for writing are full."""

_ROWS, _STEPS, _COMBINE = "HWiIiII", "iIWLWLLLF", "iiF"
SIGNATURES = {
    "blend": f"{_ROWS}ii{_STEPS}{_COMBINE}FiilHWDIW",
    "elect": f"{_ROWS}ii{_STEPS}iFffHDIW",
    "direct": f"HWIIiii{_STEPS}{_COMBINE}FiiliiiDIW",
    "multi_tensor": "HWIFiiiiIW",
    "squares": f"{_ROWS}ii{_STEPS}{_COMBINE}fLIW",
    "measure": f"{_ROWS}ii{_STEPS}iILiWWW",
    "note": f"{_ROWS}ii{_STEPS}iIWiWWIIW",
    "sample": f"{_ROWS}ii{_STEPS}iIWW",
    "rank_noted": "WiiwiLII",
    "hash_noted": "WWiwliL",
    "rank_hashes": "LiiIL",
    "energy": "HWiiDW",
    "rank": "WIliiILWW",
    "words": "liiIW",
    "spread": f"HWIIiii{_STEPS}FIW",
    "add_up": "WiiL",
    "tally": "WiwwwiI",
    "tally_hashes": "WiiwlllwiI",
    "select": "WiiwllW",
    "products": "WIiiiDID",
    "rule": "iFiiDiFFF",
}
"""Arguments of the entry points of `ktmerge.merge.kernels.compiled`: int64 (i), uint32 (w), uint64 (l) and fp32 (f);
addresses of int64 (I), uint16 (H), uint32 (W), uint64 (L), fp32 (F) and fp64 (D). All return an int64."""
