"""Bins of the newest readings against the manifest's reference histograms, for input-drift metrics. numpy only."""

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

from model.contract import Manifest

Readings = npt.NDArray[np.float32]
MAX_STORED_BINS = 255  # one byte per channel


class DriftBins:
    """The channels that have a reference histogram. `channels` are their names, `widths` the bins of each."""

    def __init__(self, manifest: Manifest, input_shape: tuple[int, ...]) -> None:
        names = manifest.channel_names
        one_value_per_channel = input_shape[-1:] == (len(names),) and len(input_shape) <= 2
        reference = manifest.reference.channels if manifest.reference and one_value_per_channel else {}
        self._columns = [k for k, name in enumerate(names) if name in reference]
        self.channels = tuple(names[k] for k in self._columns)
        self._edges = [reference[name].edges for name in self.channels]
        self.columns = list(zip(self._columns, self._edges, strict=True))  # index and bin edges of each channel
        self.widths = {name: len(edges) + 1 for name, edges in zip(self.channels, self._edges, strict=True)}
        self._padded_edges = np.full((len(self.channels), max(map(len, self._edges), default=0)), np.nan)
        for row, edges in zip(self._padded_edges, self._edges, strict=True):
            row[: len(edges)] = edges
        self.storable = bool(self.channels) and self._padded_edges.shape[1] < MAX_STORED_BINS
        self._kind = np.uint8 if self._padded_edges.shape[1] < MAX_STORED_BINS else np.int64

    def bins(self, newest: Readings) -> npt.NDArray[np.integer]:
        """Return the bin of each channel (N, channels with a reference), for newest readings (N, all channels)."""
        if len(newest) == 1:
            return np.array([self.bins_of_one(newest[0])], self._kind)
        readings = newest[:, self._columns].astype(np.float64)
        below = self._padded_edges < readings[:, :, None]  # never true of the padding, which is NaN
        return np.asarray(below.sum(axis=2, dtype=self._kind))

    def bins_of_one(self, newest: Readings) -> list[int]:
        """Return the same for a single reading (all channels,), without arrays: faster for one."""
        values = newest.tolist()
        return [bisect_left(edges, values[k]) for k, edges in self.columns]
