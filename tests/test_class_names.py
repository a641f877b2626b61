"""Names of classes: counts, order, and every name that the zoo calls its data sets by."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.class_names import DATASETS, class_names

COUNTS = dict(
    imagenet=1000,
    imagenet_short=1000,
    cifar10=10,
    cifar100=100,
    cifar100_chinese=100,
    voc2007=20,
    cub=200,
    mnist=10,
    fashion_mnist=10,
    places205=205,
    dtd=47,
    fgvc_aircraft=100,
    stanford_cars=196,
    sun397=397,
    caltech101=102,
    food101=101,
    oxford_pets=37,
    flowers102=102,
)

SAMPLES = {  # (data set, label): from the data sets' own papers and files
    ("imagenet", 0): "tench, Tinca tinca",
    ("imagenet", 12): "house finch, linnet, Carpodacus mexicanus",
    ("imagenet", 65): "sea snake",
    ("imagenet", 517): "crane",
    ("imagenet", 999): "toilet tissue, toilet paper, bathroom tissue",
    ("imagenet_short", 65): "sea snake",
    ("imagenet_short", 207): "Golden Retriever",
    ("cifar10", 3): "cat",
    ("cifar100", 1): "aquarium_fish",
    ("cifar100_chinese", 0): "苹果",
    ("voc2007", 14): "person",
    ("cub", 0): "Black_footed_Albatross",
    ("cub", 199): "Common_Yellowthroat",
    ("mnist", 7): "7 - seven",
    ("fashion_mnist", 9): "Ankle boot",
    ("food101", 100): "waffles",
    ("flowers102", 101): "blackberry lily",
    ("stanford_cars", 195): "smart fortwo Convertible 2012",
}


def test_counts():
    assert set(DATASETS) == set(COUNTS)
    for dataset, count in COUNTS.items():
        names = class_names(dataset)
        assert isinstance(names, tuple) and len(names) == count, dataset
        assert all(name and name == name.strip() for name in names), dataset
        repeated = {name for name in names if names.count(name) > 1}
        assert repeated <= {"crane", "missile", "sunglasses"}, dataset  # ImageNet means two classes by each of these


@pytest.mark.parametrize(("dataset", "label"), SAMPLES)
def test_samples(dataset, label):
    assert class_names(dataset)[label] == SAMPLES[dataset, label]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ImageNet", "imagenet"),
        ("ImageNet-1k", "imagenet"),
        ("CIFAR-10", "cifar10"),
        ("CIFAR100", "cifar100"),
        ("CUB-200-2011", "cub"),
        ("PASCAL VOC 2007", "voc2007"),
        ("VOC", "voc2007"),
        ("FashionMNIST", "fashion_mnist"),
        ("StanfordCars", "stanford_cars"),
        ("FGVCAircraft", "fgvc_aircraft"),
        ("OxfordIIITPet", "oxford_pets"),
        ("SUN397", "sun397"),
    ],
)
def test_other_names(name, key):
    assert class_names(name) is class_names(key)


def test_unknown_data_sets():
    with pytest.raises(ConfigError, match="'cifr10'.*Did you mean 'cifar10'.*one per line"):
        class_names("cifr10")
    with pytest.raises(ConfigError, match="imagenet21k"):
        class_names("imagenet21k")  # MMPretrain has no names for these 21,843 classes either


def test_nothing_is_read_before_it_is_asked_for():
    code = (
        "import jaxpretrain.data.class_names as c; assert c._read.cache_info().currsize == 0; "
        "c.class_names('voc'); assert c._read.cache_info().currsize == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
