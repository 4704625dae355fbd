"""One small job of each kind whose work can be shared, and its command line."""

from __future__ import annotations

from diffalign.playground.questions import Question  # noqa: F401  the playground is there
