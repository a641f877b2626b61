"""Data sets in ArrayRecord files: our own plain records, and whatever TensorFlow Datasets has prepared."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Sample, Source, read_classes
from jaxpretrain.data.decode import BadImage
from jaxpretrain.data.labels import canonical
from jaxpretrain.data.shards import expand_files

_MAGIC = b"JPR1"


def encode_record(sample: Mapping[str, Any]) -> bytes:
    """One sample as bytes: `JPR1`, the length of a header (uint32, little-endian), the header (JSON), the image.

    The header holds `label`, `path` and whatever else the sample has that JSON can hold. The image is the encoded file
    as it is; for pixels (uint8, any shape) the header has their `shape` besides.
    """
    header = {key: value for key, value in sample.items() if key != "image"}
    header["label"] = _plain(header.get("label", -1))
    image = sample["image"]
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ConfigError(f"pixels must be uint8 to be written, got {image.dtype}")
        header["shape"] = list(image.shape)
        image = image.tobytes()
    text = json.dumps(header).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(text)), text, bytes(image)])


def decode_record(record: bytes) -> Sample:
    """The inverse of `encode_record`. Raises BadImage for a record of another format, or a damaged one."""
    if record[:4] != _MAGIC or len(record) < 8:
        raise BadImage(
            f"not a record of jaxpretrain (starts with {record[:8]!r}); data prepared by TFDS need type='TFDSDataset'"
        )
    start = 8 + struct.unpack_from("<I", record, 4)[0]
    try:
        sample = json.loads(record[8:start])
        image: Any = record[start:]
        if (shape := sample.pop("shape", None)) is not None:
            image = np.frombuffer(image, np.uint8).reshape(shape)
        return {**sample, "image": image, "label": canonical(sample["label"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadImage(f"damaged record: {error}") from error


def _plain(label: Any) -> Any:
    """A label in the form that JSON can hold: an int, a list of ints, or these by task."""
    if isinstance(label, Mapping):
        return {str(task): _plain(value) for task, value in label.items()}
    return np.asarray(label).tolist() if np.ndim(label) else int(label)


def write_array_record(
    path: str | Path,
    samples: Iterable[Mapping[str, Any]],
    classes: Sequence[str] | None = None,
    compress: bool = True,
) -> int:
    """Writes samples (dicts of `image`, `label`, optionally `path`; a source will do) to one ArrayRecord file.

    The file appears under its name only when it is complete. `classes` are written to `classes.txt` in its folder,
    where ArrayRecordDataset looks for them, and the labels to `<path>.labels.npy`, so that they are known without reading
    the images (not those of several tasks). `compress=False` for JPEG and PNG, which zstd makes no smaller, spares reading
    that work. Returns the number of records.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # One record per group: random access reads no neighbours.
    writer = ArrayRecordWriter(str(partial), "group_size:1" + ("" if compress else ",uncompressed"))
    labels: list[Any] = []
    try:
        for sample in samples:
            writer.write(encode_record(sample))
            labels.append(canonical(sample.get("label", -1)))
    finally:
        writer.close()
    _write_labels(path, labels)
    os.replace(partial, path)
    if classes is not None:
        (path.parent / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    return len(labels)


def _labels_file(path: str | Path) -> Path:
    return Path(f"{path}.labels.npy")


def _write_labels(path: Path, labels: Sequence[Any]) -> None:
    file = _labels_file(path)
    file.unlink(missing_ok=True)  # of an earlier shard of this name
    if not labels or any(isinstance(label, Mapping) for label in labels) or len({np.shape(x) for x in labels}) > 1:
        return
    partial = file.with_name(file.name + ".partial")
    with open(partial, "wb") as handle:
        np.save(handle, np.stack(labels) if np.ndim(labels[0]) else np.asarray(labels, np.int32))
    os.replace(partial, file)


class ArrayRecordDataset(Source):
    """Images in ArrayRecord files written by `write_array_record`.

    Args:
        paths: a file, a pattern with wildcards or braces (`data/train*.array_record`, `part-{00..15}.array_record`), a
            folder (all `*.array_record` in it and below), or a list of these. Wildcards and folders give names in order.
        data_root: folder to which relative `paths` refer.
        classes: names of the classes, or a text file with one per line; by default `classes.txt` beside the first file.
        num_classes: number of classes where there are no names; found in the labels otherwise.
        split: of several splits take this: files `<split>-00000-of-00016.array_record`, or those in a folder `<split>`.
        common: `indices` and others, see Source.
    """

    per_sample = ("_rows", "labels")

    def __init__(
        self,
        paths: str | Sequence[str],
        data_root: str = "",
        classes: Sequence[str] | str | None = None,
        num_classes: int | None = None,
        split: str = "",
        **common: Any,
    ):
        import grain

        self.files = expand_files("ArrayRecordDataset", paths, data_root, ".array_record", split)
        try:
            self._records = grain.sources.ArrayRecordDataSource(self.files)
        except Exception as error:  # the reader's own exceptions differ between versions
            raise ConfigError(
                f"ArrayRecordDataset: cannot read {self.files[0]} (of {len(self.files)}): {error}"
            ) from error
        beside = Path(self.files[0]).parent / "classes.txt"
        self.classes = read_classes(beside if classes is None and num_classes is None and beside.is_file() else classes)
        self._num_classes = num_classes
        self._rows = np.arange(len(self._records))
        self.labels = _read_labels(self.files, len(self._records))
        super().__init__(**common)

    @property
    def num_classes(self) -> int | None:
        """One pass over the records, where neither names nor labels are beside them."""
        if self.classes is not None:
            return self._num_classes or len(self.classes)
        if self._num_classes is None:
            labels = self.labels if self.labels is not None else [self[i]["label"] for i in range(len(self))]
            if len({np.shape(label) for label in labels}) == 1 and not isinstance(labels[0], Mapping):
                array = np.asarray(labels)
                self._num_classes = array.shape[1] if array.ndim == 2 else int(array.max()) + 1
        return self._num_classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return decode_record(self._records[int(self._rows[index])])

    def name(self, index: int) -> str:
        return f"record {self._rows[index]} of {self.files[0]}" + (
            f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        )


def _read_labels(files: Sequence[str], count: int) -> np.ndarray | None:
    """What `write_array_record` left beside the files; None unless it is there for all of them."""
    try:
        labels = np.concatenate([np.load(_labels_file(file)) for file in files])
    except (OSError, ValueError):
        return None
    return labels if len(labels) == count else None


class TFDSDataset(Source):
    """A data set that TensorFlow Datasets has prepared with `file_format='array_record'`; TensorFlow is not needed.

    Args:
        name: of the TFDS builder, `mnist` or `imagenet2012:5.1.0`.
        split: in TFDS's notation, `train`, `validation`, `train[:90%]`.
        data_dir: TFDS's data folder; None means its default (`~/tensorflow_datasets` or $TFDS_DATA_DIR).
        image_key, label_key: features that hold the image and the label (a sequence of labels: several in an image);
            `label_key=None` for data without labels.
        common: `indices` and others, see Source.
    """

    per_sample = ("_rows",)

    def __init__(
        self,
        name: str,
        split: str = "train",
        data_dir: str | None = None,
        image_key: str = "image",
        label_key: str | None = "label",
        **common: Any,
    ):
        self._args = (name, split, data_dir, image_key, label_key)
        self._open()
        self._rows = np.arange(len(self._data))
        super().__init__(**common)

    def _open(self) -> None:
        name, split, data_dir, self._image_key, self._label_key = self._args
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ConfigError("TFDSDataset needs tensorflow-datasets: pip install tensorflow-datasets") from error
        data_dir = os.path.expanduser(data_dir) if data_dir is not None else None
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except Exception as error:  # unknown names raise several kinds of exception
            raise ConfigError(
                f"TFDSDataset: cannot load the builder {name!r} from {data_dir or 'the default folder'}: {error}"
            ) from error
        features = builder.info.features or {}
        for key, option in ((self._image_key, "image_key"), (self._label_key, "label_key")):
            if key is not None and key not in features:
                raise ConfigError(
                    f"TFDSDataset: {name} has no feature {key!r} ({option}); it has {', '.join(features)}"
                )
        try:
            self._data = builder.as_data_source(split, decoders={self._image_key: tfds.decode.SkipDecoding()})
        except Exception as error:
            raise ConfigError(
                f"TFDSDataset: split {split!r} of {name} is not ready in {builder.data_dir}: {error}\n"
                f"Prepare it once with tfds.builder({name!r}, data_dir=..., "
                "file_format='array_record').download_and_prepare(); "
                f"its splits: {', '.join(builder.info.splits) or 'none prepared yet'}."
            ) from error
        label = features[self._label_key] if self._label_key else None
        label = getattr(label, "feature", label)  # of a sequence
        self._num_classes = getattr(label, "num_classes", None)
        names = getattr(label, "names", None)
        self.classes = tuple(names) if names else None

    def __getstate__(self) -> dict[str, Any]:
        # Readers and feature objects are opened again in a worker process.
        return {"_args": self._args, "_rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._args, self._rows = state["_args"], state["_rows"]
        self._open()

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        record = self._data[int(self._rows[index])]
        label: Any = record[self._label_key] if self._label_key else -1
        if np.ndim(label):
            several = np.zeros(self._num_classes or 0, np.int8)
            several[label] = 1
            label = several
        else:
            label = int(label)
        return {"image": record[self._image_key], "label": label}

    def name(self, index: int) -> str:
        return f"sample {self._rows[index]} of {self._args[0]} {self._args[1]}"
