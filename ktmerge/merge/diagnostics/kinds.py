"""What a tensor does inside a layer (queries, the gate of a feed-forward block, a norm), judged by its name."""

from __future__ import annotations

import re

KINDS = ("q", "k", "v", "qkv", "o", "router", "gate", "up", "down", "norm", "other")
"""In the order in which a layer uses them; ``up`` also stands for gate and up in one matrix."""

# The first that fits decides. A bias goes with its weight, a norm of queries with the norms.
_NAMES = tuple(
    (kind, re.compile(pattern, re.I))
    for kind, pattern in (
        ("norm", r"norm|(^|\.)ln(_|\d|\.)|_ln\."),
        ("qkv", r"(^|[._])(c_attn|query_key_value|w?qkv(_proj)?|in_proj\w*|kv_[ab]_proj\w*)(\.|$)"),
        ("router", r"(moe\.gate|mlp\.gate|shared_expert_gate|(^|\.)gate)\.(weight|bias)$|router"),
        ("q", r"(^|[._])(q|wq|query)(_proj|_lin|_[ab]_proj)?\.\w+$"),
        ("k", r"(^|[._])(k|wk|key)(_proj|_lin)?\.\w+$"),
        ("v", r"(^|[._])(v|wv|value)(_proj|_lin)?\.\w+$"),
        ("down", r"dense\w*\.wo\."),  # of T5, whose attention has an output of its own
        ("o", r"(^|[._])(o|wo|out)(_proj|_lin)?\.\w+$"),
        ("o", r"attn\.(c_)?proj(ection)?\.|attention\.(output\.)?dense\.|attention\.projection"),
        ("gate", r"(^|[._])(gate_proj|w1|wi_0|w_gate)(\.|$)"),
        ("up", r"(^|[._])((gate_)?up_proj(_bias)?|w3|fc1|linear_?(fc)?1|c_fc|wi|wi_1|dense_h_to_4h|lin1)(\.|$)"),
        ("up", r"intermediate\.dense\."),
        ("down", r"(^|[._])(down_proj(_bias)?|w2|fc2|linear_?(fc)?2|c_proj|dense_4h_to_h|lin2)(\.|$)"),
        ("down", r"output\.dense\."),
    )
)


def kind_of(name: str) -> str:
    """One of `KINDS`."""
    return next((kind for kind, pattern in _NAMES if pattern.search(name)), "other")
