"""Which associations lists are asked for on: many series on several, a single study on the one that found it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from functools import partial

from airflow_dicom_get import clock
from airflow_dicom_get.engine.listing import ListSeries, SeriesInfo, one_by_one
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.lists.finder import Finder
from airflow_dicom_get.net.find import FIND_PROPOSALS

log = logging.getLogger(__name__)

_WORTH = 4
"""Series for which another association is opened: that takes about as long as to ask for two."""


class Spread:
    """Has series listed on the given association and on others beside it.

    Parameters
    ----------
    source : Source
        Where the others are opened. One that is refused, or lost, is done without.
    associations : int
        How many may ask, including the given one.
    """

    def __init__(self, source: Source, associations: int) -> None:
        self._source, self._associations = source, associations

    def __call__(self, finder: Finder, series: Collection[SeriesInfo], list_series: ListSeries) -> None:
        """List each series. Raises what the given association raises."""
        more = min(self._associations - 1, len(series) // _WORTH)
        if more < 1:
            one_by_one(finder, series, list_series)
            return
        queue = deque(series)

        def end(error: BaseException) -> None:
            queue.clear()
            if not isinstance(error, DicomGetError):
                self._source.end_at_once(error)

        here, beside = partial(_serve, finder, queue, list_series), partial(self._beside, queue, list_series)
        clock.together([here, *[beside] * more], "dicom-get-list", end)
        _serve(finder, queue, list_series)  # what others have put back

    def _beside(self, queue: deque[SeriesInfo], list_series: ListSeries) -> None:
        try:
            with self._source.association(FIND_PROPOSALS) as association:
                _serve(Finder(association, self._source.cuts), queue, list_series)
        except DicomGetError as error:
            log.info("continuing to list with fewer associations: %s", error.message)


def _serve(finder: Finder, queue: deque[SeriesInfo], list_series: ListSeries) -> None:
    while queue:
        try:
            one = queue.popleft()
        except IndexError:  # another was quicker
            return
        try:
            list_series(finder, one)
        except BaseException:
            queue.append(one)
            raise
