"""Images as ArrayRecord shards: `python -m jaxpretrain.tools.folder_to_array_record DATA --dst=FOLDER`.

Any data set that the library reads becomes `FOLDER/<name>-00000-of-00257.array_record`, ..., with `classes.txt`, for
`dict(type='ArrayRecordDataset', paths=FOLDER)`, or for ImageNet `dict(type='ImageNet', data_root=FOLDER, split=...)`. Files
are copied as they are; `--short-edge=256` makes larger images smaller (JPEG). A run that was interrupted goes on with the
shards that are missing, and a shard appears only when it is complete.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.data.decode import BadImage, as_rgb
from jaxpretrain.data.image_ops import resize
from jaxpretrain.data.records import write_array_record
from jaxpretrain.tools.sweep import DATA_FLAGS, DATA_HELP, Log, fingerprint, number, open_data, progress, sweep

FLAGS = {
    **DATA_FLAGS,
    "dst": "the folder to write to",
    "name": "the shards' names begin with it (default: the split, or train)",
    "shard-size": "images in a shard (default: 5000)",
    "short-edge": "make images smaller whose shorter edge is longer than so many pixels: 256, 512",
    "quality": "of the JPEGs that --short-edge makes (default: 95)",
    "max-bad": "part of the images that may be unreadable, and is left out (default: 0.001)",
}
SWITCHES = {"restart": "remove the shards of this name, and begin anew"}


class WriteShard:
    """Writes shard `number` of a data set; a dict of `shard`, `records` and `bad`, names and reasons of what is left out.

    Args:
        source: the data set.
        files: of the shards.
        size: images in a shard.
        root: folder to which the paths in the records are relative.
        short_edge, quality: see `smaller`; None copies images as they are.
    """

    def __init__(
        self, source: Any, files: list[str], size: int, root: str, short_edge: int | None = None, quality: int = 95
    ):
        self.source, self.files, self.size, self.root = source, files, size, root
        self.short_edge, self.quality = short_edge, quality

    def __call__(self, number: int) -> dict[str, Any]:
        bad: list[tuple[str, str]] = []
        first = number * self.size
        samples = self._samples(range(first, min(first + self.size, len(self.source))), bad)
        first_sample = next(samples, None)
        encoded = first_sample is not None and isinstance(first_sample["image"], bytes)
        whole = (sample for part in (() if first_sample is None else (first_sample,), samples) for sample in part)
        return {
            "shard": number,
            "records": write_array_record(self.files[number], whole, compress=not encoded),
            "bad": bad,
        }

    def _samples(self, rows: range, bad: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            try:
                sample = self.source[row]
                image = sample["image"]
                if self.short_edge is not None:
                    image = smaller(image, self.short_edge, self.quality)
                elif not len(image):
                    raise BadImage("empty file")
            except (BadImage, OSError) as error:
                name = self.source.name(row) if hasattr(self.source, "name") else f"sample {row}"
                bad.append((name, str(error)))
                continue
            record = {"image": image, "label": sample.get("label", -1)}
            if path := sample.get("path"):
                record["path"] = (
                    os.path.relpath(path, self.root) if os.path.isabs(path) == os.path.isabs(self.root) else path
                )
            yield record


def smaller(image: bytes | UInt8[np.ndarray, "h w *c"], short_edge: int, quality: int = 95) -> Any:
    """An image whose shorter edge is longer than `short_edge`, as JPEG with that edge (area filter); others as they are.

    Raises BadImage.
    """
    pixels = np.asarray(as_rgb(image))
    height, width = pixels.shape[:2]
    if min(height, width) <= short_edge:
        return image
    scale = short_edge / min(height, width)
    return encode_jpeg(resize(pixels, (round(width * scale), round(height * scale)), "cv2", "area"), quality)


def encode_jpeg(pixels: UInt8[np.ndarray, "h w 3"], quality: int) -> bytes:
    """JPEG with colours at half the resolution, as photographs usually are."""
    try:
        import simplejpeg
    except ImportError:  # pragma: no cover
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        return buffer.getvalue()
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorsubsampling="420")


def convert(
    config: Mapping[str, Any],
    source: Any,
    dst: Path,
    name: str,
    *,
    shard_size: int = 5000,
    short_edge: int | None = None,
    quality: int = 95,
    max_bad: float = 0.001,
    workers: int = 0,
    threads: int = 0,
    restart: bool = False,
) -> tuple[int, list[tuple[str, str]]]:
    """Writes a data set to shards; goes on where an earlier call ended.

    Args:
        config, source: the data set.
        dst, name: the shards are `<dst>/<name>-00000-of-00257.array_record`, ....
        shard_size: images in a shard.
        short_edge, quality: see `smaller`; None copies images as they are.
        max_bad: part of the images that may be unreadable.
        workers, threads: see `sweep`.
        restart: begin anew.

    Returns:
        The number of records, and (name, reason) of the images that are left out.

    Raises:
        ConfigError: `dst` holds shards of this name that are of other work.
        cli.ExpectedFailure: too many bad images; files with another number of records than was written.
    """
    count = math.ceil(len(source) / shard_size)
    files = [str(dst / f"{name}-{i:05d}-of-{count:05d}.array_record") for i in range(count)]
    log_file = dst / f"{name}.conversion.log"
    present = sorted(dst.glob(f"{name}-?????-of-?????.array_record*"))
    if restart:
        for file in present:
            file.unlink()
    elif present and not log_file.exists():
        raise ConfigError(
            f"{dst} already has shards of this name, such as {present[0].name}; choose another --name or --dst"
        )
    work = {"tool": "folder_to_array_record", **fingerprint(config, source)}
    work |= {"shard_size": shard_size, "short_edge": short_edge, "quality": quality if short_edge else None}
    log = Log(log_file, work, restart)
    done = {
        record["shard"]: record
        for record in log.records
        if "shard" in record and os.path.exists(files[record["shard"]])
    }
    if done:
        print(f"{len(done)} of {count} shards are there already")
    base = os.path.expanduser(str(config.get("data_root") or "")) or "."
    write = WriteShard(source, files, shard_size, base, short_edge, quality)
    rest = [shard for shard in range(count) if shard not in done]
    size = lambda shard: min(shard_size, len(source) - shard * shard_size)  # noqa: E731
    with progress(len(source), "write", sum(map(size, done))) as bar:
        for _, (result,) in sweep(write, rest, workers=workers, threads=threads, chunk=1, ordered=False):
            log.write(**result)
            done[result["shard"]] = result
            bar.update(size(result["shard"]))
            bad = [tuple(pair) for shard in sorted(done) for pair in done[shard]["bad"]]
            _check_bad(bad, len(source), max_bad)
    bad = [tuple(pair) for shard in sorted(done) for pair in done[shard]["bad"]]
    _check_bad(bad, len(source), max_bad)
    records = _check_count(files, [done[shard]["records"] for shard in range(count)])
    if records + len(bad) != len(source):
        raise cli.ExpectedFailure(
            f"{dst}: {records} records and {len(bad)} bad images, but {len(source)} images were given"
        )
    if getattr(source, "classes", None):
        names = dst / "classes.txt.partial"
        names.write_text("".join(f"{name}\n" for name in source.classes), encoding="utf-8")
        os.replace(names, dst / "classes.txt")
    log.write(finished=True)
    log.close()
    return records, bad


def _check_bad(bad: list[Any], total: int, most: float) -> None:
    if len(bad) > most * total:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in bad[:10])
        raise cli.ExpectedFailure(
            f"{len(bad)} of {total} images cannot be read, more than --max-bad={most:g} allows:{listed}\n"
            "verify_dataset finds them all, and moves them aside by --fix"
        )


def _check_count(files: list[str], expected: list[int]) -> int:
    """The number of records in all files, as they are on disk."""
    from array_record.python.array_record_module import ArrayRecordReader

    for file, records in zip(files, expected, strict=True):
        reader = ArrayRecordReader(file)
        found = reader.num_records()
        reader.close()
        if found != records:
            raise cli.ExpectedFailure(
                f"{file} has {found} records, but {records} were written; remove it and run again"
            )
    return sum(expected)


def main(argv: list[str]) -> int:
    given, rest = cli.positional(argv, FLAGS)
    flags = cli.parse(rest, FLAGS, SWITCHES, f"{__doc__}\n{DATA_HELP}\n")
    if not flags.dst:
        raise ConfigError("--dst is needed: the folder to write to")
    if "quality" in flags.values and "short-edge" not in flags.values:
        raise ConfigError("--quality goes with --short-edge; without it files are copied as they are")
    config, source = open_data(given, flags)
    dst, name = Path(flags.dst).expanduser(), flags.name or flags.split or "train"
    quality = number(flags, "quality", 95, 1)
    if quality > 100:
        raise ConfigError(f"--quality={quality} must be at most 100")
    records, bad = convert(
        config,
        source,
        dst,
        name,
        shard_size=number(flags, "shard-size", 5000, 1),
        short_edge=number(flags, "short-edge", 0, 1) if "short-edge" in flags.values else None,
        quality=quality,
        max_bad=_part(flags.values.get("max-bad", "0.001")),
        workers=number(flags, "num-workers", 0),
        threads=number(flags, "num-threads", 0),
        restart=bool(flags.restart),
    )
    if bad:
        listed = dst / f"{name}.bad_images.txt"
        listed.write_text("".join(f"{path}\t{reason}\n" for path, reason in bad), encoding="utf-8", errors="replace")
        print(f"{len(bad)} bad images are left out; see {listed}")
    print(f"{records} records in {math.ceil(len(source) / number(flags, 'shard-size', 5000, 1))} shards in {dst}")
    print(f"dataset = dict(type='ArrayRecordDataset', paths={str(dst)!r}, split={name!r})")
    return cli.OK


def _part(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--max-bad={text} must be a number from 0 to 1") from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
