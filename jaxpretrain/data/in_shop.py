"""DeepFashion's in-shop clothes, for retrieval: which pictures show the same item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxpretrain.build import ConfigError
from jaxpretrain.data.image_set import ImageSet, Listing


class InShop(ImageSet):
    """DeepFashion's In-shop Clothes Retrieval (Liu et al., 2016): 25882 training, 14218 query, 12612 gallery images.

    A label is the number of an item: one of 3997 in `train`; one of 3985 other items in `query` and `gallery`, where equal
    labels mean the same item. A retrieval evaluation looks for each query among the gallery's features; what it should
    find is in `matches`.

    Args:
        data_root: folder of the data set, with what `layout` says.
        split: train, query or gallery.
        data_prefix: folder of the images, to which the paths of the list are relative.
        ann_file: the list, relative to data_root.
        options: see ImageSet. Items have no names; `classes` is refused.
    """

    splits = ("train", "query", "gallery")
    layout = """
        Img/img/<kind>/<item>/*.jpg
        Eval/list_eval_partition.txt: the number of images, a line of headings, and lines of '<path> <item> <split>'
    """

    def __init__(
        self,
        data_root: str,
        split: str | None = None,
        data_prefix: str | Mapping[str, str] = "Img",
        ann_file: str = "Eval/list_eval_partition.txt",
        **options: Any,
    ):
        self.prefix = data_prefix if isinstance(data_prefix, str) else data_prefix.get("img_path", "")
        self.ann_file = ann_file
        if options.get("classes") or (options.get("metainfo") or {}).get("classes"):
            raise ConfigError("InShop: items have no names, so `classes` does not apply")
        super().__init__(data_root, split, **options)

    def read(self) -> Listing:
        folder, listed = self.folder(self.prefix), self.file(self.ann_file)
        with open(listed, encoding="utf-8") as file:
            announced = file.readline().strip()
        rows = list(self.rows(listed, r"(\S+)\s+(\S+)\s+(train|query|gallery)", "<path> <item> <split>", skip=2))
        if not announced.isdigit() or int(announced) != len(rows):
            raise ConfigError(f"{listed}: its first line is {announced!r}, but {len(rows)} images follow")
        # Items are numbered as they come in the list; those of the gallery are what queries are about.
        items: dict[str, int] = {}
        self._gallery = np.array(
            [
                items.setdefault(item, len(items))
                for _, item, split in rows
                if split == ("train" if self.split == "train" else "gallery")
            ],
            np.int32,
        )
        own = [(path, item) for path, item, split in rows if split == self.split]
        if lost := sorted({item for _, item in own if item not in items}):
            raise ConfigError(f"{listed}: {len(lost)} queries have no match in the gallery: {', '.join(lost[:5])}")
        self._items = len(items)
        return [f"{folder}/{path}" for path, _ in own], [items[item] for _, item in own]

    @property
    def num_classes(self) -> int:
        """The number of items."""
        return self._items

    @property
    def matches(self) -> list[Int[np.ndarray, " k"]]:
        """For each query, the positions in the gallery that show the same item."""
        if self.split != "query":
            raise ConfigError(f"InShop: matches are those of the split 'query', not of {self.split!r}")
        order = np.argsort(self._gallery, kind="stable")
        first = np.searchsorted(self._gallery[order], np.arange(self._items + 1))
        return [order[first[label] : first[label + 1]] for label in self.labels]
