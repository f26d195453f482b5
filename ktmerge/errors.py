"""What can go wrong, as types. One sentence each: what is wrong, where, what to do instead."""

from __future__ import annotations


class KtmergeError(Exception):
    """The run failed for a reason ktmerge understands. The command line prints it without a traceback."""

    exit_code = 1


class UsageError(KtmergeError):
    """The input is at fault (a key, a file, a tensor); nothing was started and nothing was lost."""

    exit_code = 2
