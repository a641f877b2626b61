"""Data sets that an annotation file describes: one label, several labels, or labels of several tasks for each image.

The files are those of OpenMMLab 2.0: JSON or YAML with `metainfo`, a dictionary, and `data_list`, a list of dictionaries
with `img_path` and `gt_label`. `ImageList` reads MMSelfSup's text files instead.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Int8

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.base import Label, Sample, Source, read_classes
from jaxpretrain.data.layout import layout_error
from jaxpretrain.data.listing import Paths
from jaxpretrain.data.sources import CustomDataset

Item = dict[str, Any]  # of one sample: `img_path`, or pixels as `img`; `gt_label`; whatever else transforms may ask for


class BaseDataset(Source):
    """Images and labels by an annotation file, or by a sub-class's own `load_data_list`.

    A sample is its entry in the list without `img_path`, `img` and `gt_label`, plus `image`, `label` and `path`: what else
    an entry has reaches the transforms. A label is an integer, -1 where there is none.

    A sub-class may override `load_data_list`, for files of another form, and `parse_data_info` and `filter_data`, as in
    MMEngine; they find `ann_file`, `data_root` and `data_prefix` (both joined to `data_root`) and `filter_cfg` as attributes.

    Args:
        ann_file: the annotation file, or several of them, one after another: .json, .yaml, .yml, or .pkl, .pickle.
        metainfo: goes before the `metainfo` of the file; `classes` are the names of the classes.
        data_root: folder to which `ann_file` and `data_prefix` refer.
        data_prefix: folder of the images, to which `img_path` refers; a mapping names one for each key.
        filter_cfg: for the `filter_data` of a sub-class.
        classes: names of the classes, or a text file with one per line; goes before `metainfo`.
        allow_pickle: a pickle may run any program when it is read, so such a file is read only if this is True.
        common: `indices` and others, see Source.

    Raises:
        ConfigError: a file that is missing, malformed or a pickle; entries without an image, or with labels of another
            kind or out of range. That an image is missing shows only when it is read.
    """

    METAINFO: ClassVar[Mapping[str, Any]] = {}  # of a sub-class; goes before that of the file
    per_sample = ("labels", "_paths", "_rest")

    def __init__(
        self,
        ann_file: str | Sequence[str] = "",
        metainfo: Mapping[str, Any] | None = None,
        data_root: str | None = "",
        data_prefix: str | Mapping[str, str] | None = "",
        filter_cfg: Mapping[str, Any] | None = None,
        classes: Sequence[str] | str | None = None,
        allow_pickle: bool = False,
        **common: Any,
    ):
        self.data_root = os.path.expanduser(data_root or "")
        prefix = dict(data_prefix) if isinstance(data_prefix, Mapping) else {"img_path": data_prefix or ""}
        self.data_prefix = {key: self._under_root(folder) for key, folder in prefix.items()}
        files = [ann_file] if isinstance(ann_file, str) else list(ann_file)
        files = [self._under_root(file) if file else "" for file in files]
        self.ann_file: Any = files[0] if len(files) == 1 else files
        self.filter_cfg, self.allow_pickle = dict(filter_cfg or {}), allow_pickle
        self.metainfo: dict[str, Any] = {**self.METAINFO, **(metainfo or {})}
        if classes is not None:
            self.metainfo["classes"] = classes
        self.data_list: list[Item] = self.load_data_list()
        self.data_list = self.filter_data()
        self.classes = read_classes(self.metainfo.get("classes"))
        if not self.data_list:
            raise ConfigError(f"{type(self).__name__}: {self._files()} has no samples")
        for number, item in enumerate(self.data_list):
            if not isinstance(item, Mapping) or not ("img_path" in item or "img" in item):
                raise ConfigError(self._at(number, "expected a dictionary with img_path (or pixels as img)"))
        self._num_classes: Any = None
        self.labels = self._read_labels([_label_of(item) for item in self.data_list])
        self._paths = Paths(str(item.get("img_path", "")) for item in self.data_list)
        self._rest = _Items({k: v for k, v in item.items() if k not in _READ} for item in self.data_list)
        del self.data_list  # arrays of bytes from here on: less memory, and cheap to send to worker processes
        super().__init__(**common)

    # ------------------------------------------------------------------------------- what a sub-class may override

    def load_data_list(self) -> list[Item]:
        """The entries of all samples, from `ann_file`; adds to `metainfo` what it lacks."""
        entries: list[Item] = []
        for file in self.ann_file if isinstance(self.ann_file, list) else [self.ann_file]:
            content = self._load(file)
            if not isinstance(content, Mapping) or not isinstance(content.get("data_list"), Sequence):
                found = f"the keys {list(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
                raise ConfigError(f"{file}: expected a dictionary with metainfo and data_list, a list; found {found}")
            own = content.get("metainfo") or {}
            if not isinstance(own, Mapping):
                raise ConfigError(f"{file}: metainfo must be a dictionary, not {own!r}")
            for key, value in own.items():
                if key == "classes" and entries and list(value) != list(self.metainfo.get(key) or value):
                    raise ConfigError(f"{self._files()}: the files name different classes")
                self.metainfo.setdefault(str(key), value)
            for raw in content["data_list"]:
                parsed = self.parse_data_info(raw)
                entries += parsed if isinstance(parsed, list) else [parsed]
        return entries

    def parse_data_info(self, raw_data_info: Any) -> Item | list[Item]:
        """One entry of the file as that of a sample, or of several: with the folder before each of its paths."""
        if not isinstance(raw_data_info, Mapping):
            return raw_data_info  # refused with its number later
        entry = dict(raw_data_info)
        for key, folder in self.data_prefix.items():
            if isinstance(entry.get(key), str):
                entry[key] = os.path.join(folder, entry[key])
        return entry

    def filter_data(self) -> list[Item]:
        """The entries of `data_list` to keep: all of them."""
        return self.data_list

    # -----------------------------------------------------------------------------------------------------------

    @property
    def img_prefix(self) -> str:
        """The folder of the images."""
        return self.data_prefix.get("img_path", "")

    @property
    def num_classes(self) -> Any:
        """Number of classes: of the names, or else the highest label plus one; None without labels."""
        return self._num_classes

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return self._paths[index] or super().name(index)

    def get_data_info(self, index: int) -> Item:
        """The sample without its image."""
        path = {"path": self._paths[index]} if self._paths[index] else {}
        return {**self._rest[index], **path, "label": _one(self.labels, index)}

    def __getitem__(self, index: int) -> Sample:
        sample = self.get_data_info(index)
        if "img" in sample:
            sample["image"] = sample.pop("img")
        else:
            with open(sample["path"], "rb", buffering=0) as file:
                sample["image"] = file.read()
        return sample

    def _under_root(self, path: str) -> str:
        return os.path.join(self.data_root, os.path.expanduser(path))

    def _files(self) -> str:
        files = self.ann_file if isinstance(self.ann_file, list) else [self.ann_file]
        return ", ".join(files) or f"{type(self).__name__}.load_data_list()"

    def _at(self, number: int, problem: str) -> str:
        item = str(self.data_list[number])
        return f"{self._files()}: sample {number}: {problem}; got {item if len(item) < 200 else item[:200] + '...'}"

    def _load(self, file: str) -> Any:
        kind = os.path.splitext(file)[1].lower()
        if kind not in _FORMATS:
            name = type(self).__name__
            raise ConfigError(f"{name}: ann_file={file!r} must end in {', '.join(_FORMATS)}.{nearest(kind, _FORMATS)}")
        if not os.path.isfile(file):
            problem = f"there is no file {os.path.abspath(file)} (ann_file)"
            expected = "ann_file, and the images in data_prefix/"
            raise layout_error(type(self).__name__, self.data_root or ".", problem, expected)
        if kind in (".pkl", ".pickle"):
            if not self.allow_pickle:
                raise ConfigError(
                    f"{file} is a pickle, and reading one runs whatever program is in it. Convert it to JSON, or set "
                    "allow_pickle=True if you trust where it comes from"
                )
            with open(file, "rb") as stream:
                return pickle.load(stream)
        try:
            with open(file, encoding="utf-8") as text:
                if kind == ".json":
                    return json.load(text)
                import yaml

                return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except ValueError as error:  # JSON's errors, and text that is not UTF-8
            raise ConfigError(f"{file} is damaged or not {kind[1:].upper()}: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is damaged or not YAML: {error}") from error

    def _read_labels(self, labels: list[Any]) -> Any:
        """`labels` and `_num_classes` from the entries' labels, None where there is none."""
        for number, label in enumerate(labels):
            if not _is_int(label) and label is not None:
                hint = "; data with several labels per image need type='MultiLabelDataset'" if _is_list(label) else ""
                hint = "; labels of several tasks need type='MultiTaskDataset'" if isinstance(label, Mapping) else hint
                raise ConfigError(self._at(number, f"gt_label must be an integer{hint}"))
        column = np.array([-1 if label is None else label for label in labels], np.int64)
        self._num_classes = len(self.classes) if self.classes is not None else int(column.max()) + 1 or None
        self._check_range(column, column, self._num_classes)
        return column.astype(np.int32)

    def _check_range(self, labels: Int[np.ndarray, " k"], samples: Any, num_classes: int | None) -> None:
        """Raises ConfigError where one of the labels is no class; `samples` says whose it is, by number."""
        wrong = np.flatnonzero((labels < -1) | (labels >= (num_classes or 0)) & (labels >= 0))
        if wrong.size:
            number = int(wrong[0]) if samples is labels else int(samples[wrong[0]])
            raise ConfigError(self._at(number, f"label {labels[wrong[0]]} does not fit {num_classes} classes"))


class MultiLabelDataset(BaseDataset):
    """Several labels for each image: `gt_label` lists the numbers of the classes that are there.

    A sample's label is int8 [classes], 1 or 0 for each class, and a row of -1 where there is no `gt_label`. `labels` has
    them all, [N, classes]. For the arguments see BaseDataset.
    """

    def _read_labels(self, labels: list[Any]) -> Int8[np.ndarray, "n classes"]:
        lists: list[list[int]] = []
        for number, label in enumerate(labels):
            label = [label] if _is_int(label) else [] if label is None else label
            if not _is_list(label) or not all(map(_is_int, label)):
                raise ConfigError(self._at(number, "gt_label must be a list of class numbers"))
            lists.append([int(one) for one in label])
        samples = np.repeat(np.arange(len(lists)), [len(label) for label in lists])
        flat = np.array([one for label in lists for one in label], np.int64)
        self._num_classes = len(self.classes) if self.classes is not None else int(flat.max(initial=-1)) + 1 or None
        if (flat < 0).any():
            raise ConfigError(self._at(int(samples[np.argmin(flat)]), "a class number is negative"))
        self._check_range(flat, samples, self._num_classes)
        found = np.zeros((len(lists), self._num_classes or 0), np.int8)
        found[samples, flat] = 1
        found[[label is None for label in labels]] = -1
        return found


class MultiTaskDataset(BaseDataset):
    """Labels of several tasks for each image: `gt_label` is a dictionary by task; tasks may be missing in it.

    A task's label is an integer, or a list with a number for each of its classes: 1 there, 0 not there, -1 not counted.
    `metainfo` may list the `tasks`, by name or as dictionaries with `name` and `categories`, the names of its classes; by
    default they are those that occur. A sample's label is a dictionary of all of them, with -1 (or a row of -1) for what is
    missing, and `labels` a dictionary of int32 [N] or int8 [N, classes]. A task may be a dictionary of tasks again.

    For the arguments see BaseDataset.

    Attributes:
        num_classes: number of classes of each task.
    """

    def _read_labels(self, labels: list[Any]) -> dict[str, Any]:
        tasks = self.metainfo.get("tasks")
        names = None if tasks is None else {t["name"] if isinstance(t, Mapping) else t: t for t in tasks}
        self._num_classes, columns = self._columns(labels, names, "gt_label")
        return columns

    def _columns(self, labels: list[Any], tasks: Mapping[str, Any] | None, where: str) -> tuple[dict, dict]:
        """(number of classes, labels of all samples), by task."""
        for number, label in enumerate(labels):
            if label is not None and not isinstance(label, Mapping):
                raise ConfigError(self._at(number, f"{where} must be a dictionary of labels by task"))
        found = list(dict.fromkeys(str(name) for label in labels if label for name in label))
        if tasks is not None and (unknown := [name for name in found if name not in tasks]):
            raise ConfigError(
                f"{self._files()}: there are labels for {', '.join(unknown)}, which metainfo.tasks does not name."
                f"{nearest(unknown[0], tasks)}"
            )
        classes: dict[str, Any] = {}
        columns: dict[str, Any] = {}
        for name in found if tasks is None else tasks:
            said = tasks[name] if tasks is not None else None
            given = [None if label is None else label.get(name) for label in labels]
            known = len(said["categories"]) if isinstance(said, Mapping) and "categories" in said else None
            if any(isinstance(label, Mapping) for label in given):
                classes[name], columns[name] = self._columns(given, None, f"{where}[{name!r}]")
            else:
                classes[name], columns[name] = self._column(given, known, f"{where}[{name!r}]")
        return classes, columns

    def _column(self, labels: list[Any], known: int | None, where: str) -> tuple[int, np.ndarray]:
        """(number of classes, labels of all samples) of one task."""
        several = next((len(label) for label in labels if _is_list(label)), None)
        for number, label in enumerate(labels):
            fits = label is None or (
                _is_int(label)
                if several is None
                else _is_list(label) and len(label) == (known or several) and all(one in (0, 1, -1) for one in label)
            )
            if not fits:
                wanted = "an integer" if several is None else f"a list of {known or several} numbers, each 1, 0 or -1"
                raise ConfigError(self._at(number, f"{where} must be {wanted}"))
        if several is not None:
            unknown = [-1] * several
            return several, np.array([unknown if label is None else label for label in labels], np.int8)
        column = np.array([-1 if label is None else label for label in labels], np.int64)
        classes = known or max(int(column.max()) + 1, 0)
        self._check_range(column, column, classes)
        return classes, column.astype(np.int32)


class ImageList(CustomDataset):
    """Images that one or several text files list, in lines of `path` or `path label`; no label is -1 (MMSelfSup).

    Args:
        ann_file: the file or files, relative to `data_root`; they are read one after another.
        data_root, data_prefix, classes, metainfo, common: see CustomDataset.
    """

    def __init__(self, ann_file: str | Sequence[str], **options: Any):
        if not ann_file:
            raise ConfigError("ImageList needs ann_file, the text file that lists the images, or several of them")
        super().__init__(ann_file=ann_file, **{"with_label": None, **options})


_FORMATS = (".json", ".yaml", ".yml", ".pkl", ".pickle")
_READ = ("img_path", "gt_label", "img_label")


class _Items(Sequence[Item]):
    """Small dictionaries as one array of bytes."""

    def __init__(self, items: Iterable[Item]):
        written = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) if item else b"" for item in items]
        self._ends = np.cumsum([len(item) for item in written])
        self._bytes = np.frombuffer(b"".join(written), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """One of them, or those of an array of positions."""
        if isinstance(index, np.ndarray):
            return _Items(self[int(i)] for i in index)
        end = self._ends[index]
        start = self._ends[index - 1] if index % len(self) else 0
        return pickle.loads(self._bytes[start:end].tobytes()) if end > start else {}


def _label_of(item: Mapping[str, Any]) -> Any:
    """The label of an entry; MMClassification's tutorial calls it `img_label`."""
    return item.get("gt_label", item.get("img_label"))


def _one(labels: Any, index: int) -> Label:
    if isinstance(labels, Mapping):
        return {name: _one(part, index) for name, part in labels.items()}
    return labels[index] if labels.ndim > 1 else int(labels[index])


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1)
