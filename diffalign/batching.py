"""Let one bad item of a batch cost nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from diffalign.errors import DiffalignError, EndpointError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_or_error(
    function: Callable[[Sequence[Item]], Iterable[Result]], items: Sequence[Item]
) -> Iterator[tuple[Item, Result | Exception]]:
    """Apply a function of batches; a batch that raises is tried again in halves.

    Args:
        function: takes a batch, returns one result per item.
        items: the batch, at least one item.

    Yields:
        Every item, in order, with its result, or with the exception that it raises when it is
        alone.

    Raises:
        DiffalignError: the GPU's memory is too small for a batch, which is no item's fault.
        EndpointError: nor is it that a server does not answer.
    """
    try:
        results = list(function(items))
    except torch.OutOfMemoryError as error:
        raise DiffalignError(
            f"the memory of the GPU does not hold {len(items)} images at once: set a smaller "
            f"batch_size, or where it is 1, make the images smaller. What is done stays, and the "
            f"same command goes on from there"
        ) from error
    except EndpointError:
        raise
    except Exception as error:  # whatever one item does, the others must not pay for it
        if len(items) == 1:
            yield items[0], error
            return
    else:
        yield from zip(items, results, strict=True)
        return
    middle = len(items) // 2
    yield from each_or_error(function, items[:middle])
    yield from each_or_error(function, items[middle:])
