"""What the published data sets of image files share: each is read as its publisher packed it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.base import check_split, read_classes
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.image_files import ImageFiles
from jaxpretrain.data.layout import layout_error
from jaxpretrain.data.listing import Paths

Listing = tuple[Sequence[str], Any]  # paths relative to data_root, and their labels: integers


class ImageSet(ImageFiles):
    """Image files of one split, as lists that came with them tell. A sub-class says in `read` how to.

    Labels start at 0, in the order of the publisher's classes, whichever of them the files at hand have.

    Args:
        data_root: folder of the data set, with what `layout` says.
        split: one of `splits`; by default the first.
        classes: other names for the classes, or a text file with one per line; also as `metainfo=dict(classes=...)`.
        metainfo: see `classes`.
        common: `indices` and others, see Source.

    Attributes:
        labels: int32 [N]; -1 where the publisher keeps them to himself.

    Raises:
        ConfigError: an unknown split, missing files or folders, malformed lists. That a listed image is missing shows
            only when it is read.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    names: ClassVar[str | None] = None  # of the classes, in class_names
    layout: ClassVar[str] = ""  # what is expected under data_root, a line for each file or folder

    def __init__(
        self,
        data_root: str,
        split: str | None = None,
        classes: Sequence[str] | str | None = None,
        metainfo: Mapping[str, Any] | None = None,
        **common: Any,
    ):
        self.split = self.splits[0] if split is None else split
        check_split(type(self).__name__, self.split, self.splits)
        self.root = os.path.expanduser(data_root)
        paths, labels = self.read()
        if not len(paths):
            raise self.wrong(f"the lists name no images of the split {self.split!r}")
        self._paths = Paths(paths)
        self.labels = np.asarray(labels, np.int32)
        known = self.known_classes()
        self.classes = read_classes((metainfo or {}).get("classes") if classes is None else classes) or known
        if known is not None and self.classes is not None:
            if len(self.classes) != len(known):
                raise ConfigError(
                    f"{type(self).__name__} has {len(known)} classes, but classes names {len(self.classes)}"
                )
            if self.labels.min() < -1 or self.labels.max() >= len(known):
                raise ConfigError(
                    f"{type(self).__name__}: labels {self.labels.min()}..{self.labels.max()} do not fit its "
                    f"{len(known)} classes; {self.root} may hold another data set, or damaged lists"
                )
        super().__init__(**common)

    def read(self) -> Listing:
        """Paths and labels of the split's images, in the order of the publisher's list."""
        raise NotImplementedError

    def known_classes(self) -> tuple[str, ...] | None:
        """The names of all classes, in the order of the labels; None where there are none."""
        return None if self.names is None else class_names(self.names)

    def wrong(self, problem: str) -> ConfigError:
        return layout_error(type(self).__name__, self.root, problem, self.layout)

    def has(self, path: str) -> bool:
        """Whether there is this file or folder under data_root."""
        return os.path.exists(os.path.join(self.root, path))

    def file(self, *paths: str) -> str:
        """The first of these files that is there."""
        for path in paths:
            if os.path.isfile(os.path.join(self.root, path)):
                return os.path.join(self.root, path)
        raise self.wrong(f"there is no file {' or '.join(paths)}")

    def folder(self, path: str) -> str:
        """This folder, which must be there; its path relative to data_root."""
        if not os.path.isdir(os.path.join(self.root, path)):
            raise self.wrong(f"there is no folder {path}")
        return path

    def rows(self, path: str, pattern: str, meaning: str, skip: int = 0) -> Iterator[tuple[Any, ...]]:
        """What the groups of `pattern` match in each line of a list; blank lines do not count.

        Args:
            path: the file, as `file` gives it.
            pattern: regular expression of a whole line.
            meaning: what a line should hold, for the error.
            skip: lines at the beginning that are no rows.
        """
        line_form = re.compile(pattern)
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if number <= skip or not (line := line.strip()):
                    continue
                if (match := line_form.fullmatch(line)) is None:
                    raise ConfigError(f"{path}:{number}: expected {meaning!r}, got {line!r}")
                yield match.groups()

    def labels_of(self, names: Iterable[str]) -> list[int]:
        """The labels of the classes that the publisher's lists call so."""
        known = {name: label for label, name in enumerate(self.known_classes() or ())}
        try:
            return [known[name] for name in names]
        except KeyError as error:
            name = error.args[0]
            raise ConfigError(f"{type(self).__name__} has no class {name!r}.{nearest(name, known)}") from None

    @property
    def num_classes(self) -> int | None:
        return None if self.classes is None else len(self.classes)


def read_mat(path: str, *variables: str) -> list[np.ndarray]:
    """Variables of a MATLAB file (version 7 or older), without axes of length 1.

    Raises:
        ConfigError: not such a file, a damaged one, or one without these variables.
    """
    from scipy.io import loadmat  # takes 0.1 s to import

    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises its own, ValueError, TypeError, zlib.error, ... for damaged files
        raise ConfigError(f"{path}: not a MATLAB file that can be read ({error}); download it again") from error
    if missing := [name for name in variables if name not in content]:
        here = ", ".join(name for name in content if not name.startswith("__"))
        raise ConfigError(f"{path}: has no variable {', '.join(missing)}; it has {here}")
    return [np.asarray(content[name]) for name in variables]


def mat_field(struct: np.ndarray, name: str, path: str) -> np.ndarray:
    """One field of a MATLAB struct of arrays, or of an array of structs, as a vector."""
    if name not in (struct.dtype.names or ()):
        raise ConfigError(f"{path}: has no field {name!r}; it has {', '.join(struct.dtype.names or ())}")
    column = struct[name]
    return np.atleast_1d(column.item() if column.shape == () else column)
