# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""As many things at once as the memory of the device takes."""

from __future__ import annotations

__all__ = ("Batches", "is_out_of_memory")

from collections.abc import Callable

import torch

_ALLOCATION_FAILED = ("out of memory", "CUFFT_ALLOC_FAILED", "_STATUS_ALLOC_FAILED")
"""What errors of CUDA and its libraries say that torch does not raise as `torch.OutOfMemoryError`."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error is that the memory of a device does not suffice.

    Parameters
    ----------
    error : `RuntimeError`
        An error of torch.

    Returns
    -------
    answer : `bool`
        Whether it is.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _ALLOCATION_FAILED)


class Batches:
    """Computes independent things in batches, which get smaller where memory runs out.

    Parameters
    ----------
    notify : `~collections.abc.Callable`, optional
        Called with a sentence whenever they get smaller.

    Notes
    -----
    The first try takes all at once. The size that worked is kept for what follows.
    """

    def __init__(self, notify: Callable[[str], None] | None = None) -> None:
        self._notify = notify
        self._limit: int | None = None

    def map[T](self, function: Callable[[slice], T], n_items: int) -> list[T]:
        """Apply a function to all items, batch by batch.

        Parameters
        ----------
        function : `~collections.abc.Callable`
            Takes the slice of a batch.
        n_items : `int`
            Number of items.

        Returns
        -------
        results : `list`
            What the function returned, in order, one a batch.

        Raises
        ------
        RuntimeError
            Raised if there is not enough memory for a single item.
        """
        results: list[T] = []
        start = 0
        while start < n_items:
            stop = min(n_items, start + (self._limit or n_items))
            try:
                results.append(function(slice(start, stop)))
            except RuntimeError as err:
                if stop - start == 1 or not is_out_of_memory(err):
                    raise
                self._limit = (stop - start) // 2
            else:
                start = stop
                continue
            # Behind the handler, where nothing refers to what the failed batch has allocated.
            torch.cuda.empty_cache()
            if self._notify is not None:
                self._notify(f"out of memory with {stop - start} at once; going on with {self._limit}")
        return results
