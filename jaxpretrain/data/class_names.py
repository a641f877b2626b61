"""Names of the classes of known data sets, in the order of their labels: MMPretrain's strings."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from jaxpretrain.build import ConfigError, nearest

_FOLDER = Path(__file__).with_name("class_names_data")  # <dataset>.txt, one name per line

# Data set -> other names that it goes by: in the zoo's results, and as a `type` in configs.
_ALSO_CALLED: dict[str, tuple[str, ...]] = {
    "imagenet": ("ImageNet-1k", "IN1k", "ILSVRC2012"),
    "imagenet_short": (),  # CLIP's one or two words for each class, for prompts
    "cifar10": (),
    "cifar100": (),
    "cifar100_chinese": (),  # Chinese CLIP's
    "voc2007": ("VOC", "PASCAL VOC 2007"),
    "cub": ("CUB-200-2011", "CUB200"),
    "mnist": (),
    "fashion_mnist": (),
    "places205": (),
    "dtd": (),
    "fgvc_aircraft": (),
    "stanford_cars": (),
    "sun397": (),
    "caltech101": (),  # with its background class: 102 names
    "food101": (),
    "oxford_pets": ("OxfordIIITPet",),
    "flowers102": ("Oxford 102 Flowers",),  # MMPretrain has none; these are VGG's, in the order of the labels
}
DATASETS: tuple[str, ...] = tuple(_ALSO_CALLED)


def class_names(dataset: str) -> tuple[str, ...]:
    """`class_names("imagenet")[65] == "sea snake"`; one name per label.

    Args:
        dataset: one of `DATASETS`, or another usual name of it (`ImageNet-1k`, `CUB-200-2011`, `FashionMNIST`, `VOC`);
            case, blanks, `-` and `_` do not matter.

    Raises:
        ConfigError: no names are known for it; naming the nearest.
    """
    spellings = {_bare(name): key for key, others in _ALSO_CALLED.items() for name in (key, *others)}
    key = spellings.get(_bare(dataset))
    if key is None:
        raise ConfigError(
            f"No class names are known for the data set {dataset!r}.{nearest(dataset, DATASETS)} Names of your own: "
            "a list, or a text file with one per line"
        )
    return _read(key)


@functools.cache
def _read(key: str) -> tuple[str, ...]:
    return tuple((_FOLDER / f"{key}.txt").read_text(encoding="utf-8").splitlines())


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
