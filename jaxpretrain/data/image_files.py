"""The base of data sets that are image files."""

from __future__ import annotations

import os

import numpy as np
from jaxtyping import Int32

from jaxpretrain.data.base import Sample, Source
from jaxpretrain.data.listing import Paths


class ImageFiles(Source):
    """Image files under one folder, with a label each; read when they are asked for.

    A sub-class sets the attributes, and then calls this constructor, which keeps the samples that `indices` names.

    Attributes:
        root: the folder, to which the paths are relative.
        labels: int32 [N]; -1 where there is none.
    """

    per_sample = ("_paths", "labels")
    root: str
    labels: Int32[np.ndarray, " n"]
    _paths: Paths

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def __getitem__(self, index: int) -> Sample:
        path = self.name(index)
        with open(path, "rb", buffering=0) as file:
            return {"image": file.read(), "label": int(self.labels[index]), "path": path}
