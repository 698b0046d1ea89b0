"""Answers requests with the reference: pickled (action, args, kwargs) on stdin, pickled (ok, value) on stdout.

Pickle is safe here because both ends are this test suite.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import warnings


def main() -> None:
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not land among the replies
    warnings.simplefilter("ignore")

    import torch

    torch.set_num_threads(1)
    from tests.reference.actions import perform

    while True:
        try:
            action, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = (True, perform(action, *args, **kwargs))
        except Exception:
            reply = (False, traceback.format_exc())
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    sys.exit(main())
