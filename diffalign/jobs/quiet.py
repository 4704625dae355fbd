"""Libraries that would talk over a job's own progress."""

from __future__ import annotations

import sys


def quieten_libraries() -> None:
    """Turn off the bars and repeated warnings of diffusers and transformers while weights load.

    The bar of `datasets`, whose first look at a large set takes long, stays on a terminal.
    """
    import datasets
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
