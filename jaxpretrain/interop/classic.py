"""timm's and torchvision's names of the convolutional networks before EfficientNet, and of ResNet's relatives.

timm's and the papers' releases of ResNeSt and Res2Net have the same names. RegNet's release is facebookresearch/pycls.
"""

from __future__ import annotations

from typing import Any

from jaxpretrain.interop import timm
from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, also_named, shape
from jaxpretrain.models.layers.sequence import MaxPool2d

_MODULE = ("module.",)


def alexnet(backbone: Any, model: Any) -> Table:
    """`AlexNet`, torchvision's."""
    rules = [Rule(f"{part}.{{k}}.{{p}}", f"backbone.{part}.{{k}}.{{p}}") for part in ("features", "classifier")]
    return Table(rules, ignore=() if backbone.num_classes > 0 else (r"^classifier\.",), prefixes=_MODULE)


def vgg(backbone: Any, model: Any) -> Table:
    """`VGG`, torchvision's."""
    rules = [*_vgg_features(backbone), Rule("classifier.{k}.{p}", "backbone.classifier.{k}.{p}")]
    return Table(rules, ignore=() if backbone.num_classes > 0 else (r"^classifier\.",), prefixes=_MODULE)


def vgg_of_timm(backbone: Any, model: Any) -> Table:
    """`VGG`, timm's, whose classifier is of convolutions."""
    rules = [
        *_vgg_features(backbone),
        Rule("pre_logits.fc1.weight", "backbone.classifier.0.weight", shape((-1, 512, 7, 7), (-1, 512 * 7 * 7))),
        Rule("pre_logits.fc1.bias", "backbone.classifier.0.bias"),
        Rule("pre_logits.fc2.weight", "backbone.classifier.3.weight", shape((4096, 4096, 1, 1), (4096, 4096))),
        Rule("pre_logits.fc2.bias", "backbone.classifier.3.bias"),
        Rule("head.fc.{p}", "backbone.classifier.6.{p}"),
    ]
    ignore = () if backbone.num_classes > 0 else (r"^pre_logits\.", r"^head\.")
    return Table(rules, ignore=ignore, prefixes=_MODULE)


def _vgg_features(backbone: Any) -> list[Rule]:
    """There, norms and activations have numbers of their own."""
    rules, place = [], 0
    for i, layer in enumerate(backbone.features):
        if isinstance(layer, MaxPool2d):
            place += 1
            continue
        rules.append(Rule(f"features.{place}.{{p}}", f"backbone.features.{i}.conv.{{p}}"))
        if layer.norm_name:
            rules.append(Rule(f"features.{place + 1}.{{bn}}", f"backbone.features.{i}.bn.{{bn}}"))
        place += 3 if layer.norm_name else 2
    return rules


def densenet(backbone: Any, model: Any) -> Table:
    """`DenseNet`. Layers had other names in torchvision's early releases, and have in its files; they are found."""
    theirs, ours = "features.denseblock{i+1}.denselayer{j+1}", "backbone.stages.{i}.block.{j}"
    rules = [
        Rule("features.conv0.weight", "backbone.stem.0.weight"),
        Rule("features.norm0.{bn}", "backbone.stem.1.{bn}"),
        Rule(f"{theirs}.norm{{k}}.{{bn}}", f"{ours}.norm{{k}}.{{bn}}"),
        Rule(f"{theirs}.conv{{k}}.weight", f"{ours}.conv{{k}}.weight"),
        Rule("features.norm5.{bn}", f"backbone.transitions.{len(backbone.stages) - 1}.0.{{bn}}"),
        Rule("features.transition{i+1}.norm.{bn}", "backbone.transitions.{i}.norm.{bn}"),
        Rule("features.transition{i+1}.conv.weight", "backbone.transitions.{i}.conv.weight"),
        *head_rules(model, "classifier"),
    ]
    return Table(also_named(rules, [("norm{k}", "norm.{k}"), ("conv{k}", "conv.{k}")]), prefixes=_MODULE)


def inception_v3(backbone: Any, model: Any) -> Table:
    """`InceptionV3`, whose names are torchvision's. Without `aux_logits` the auxiliary classifier is left out.

    torchvision's published weights take images in [-1, 1]: mean and std are 127.5 for all colours.
    """
    ignore = () if backbone.aux_logits else (r"^AuxLogits\.",)
    return Table([Rule("{rest}", "backbone.{rest}")], ignore=ignore, prefixes=_MODULE)


def resnest(backbone: Any, model: Any) -> Table:
    """`ResNeSt`."""
    rules = [
        Rule(f"layer{{i}}.{{j}}.conv2.{name}", f"backbone.layer{{i}}.{{j}}.conv2.{name}")
        for name in ("conv.weight", "bn{k}.{bn}", "fc{k}.{p}")
    ]
    return Table([*timm.resnet(backbone, model).rules, *rules], prefixes=_MODULE)


def res2net(backbone: Any, model: Any) -> Table:
    """`Res2Net`."""
    rules = [
        Rule(f"layer{{i}}.{{j}}.{name}", f"backbone.layer{{i}}.{{j}}.{name}")
        for name in ("convs.{k}.weight", "bns.{k}.{bn}")
    ]
    return Table([*timm.resnet(backbone, model).rules, *rules], prefixes=_MODULE)


def regnet(backbone: Any, model: Any) -> Table:
    """`RegNet`, torchvision's.

    Its 400MF ends with 400 channels instead of 384: `arch` is 'regnetx_400mf' with `wa=24.8, wm=2.55`, as a dictionary.
    """
    theirs, ours = "trunk_output.block{i}.block{i}-{j}", "backbone.layer{i}.{j}"
    rules = [
        Rule("stem.0.weight", "backbone.conv1.weight"),
        Rule("stem.1.{bn}", "backbone.bn1.{bn}"),
        Rule(f"{theirs}.proj.0.weight", f"{ours}.downsample.0.weight"),
        Rule(f"{theirs}.proj.1.{{bn}}", f"{ours}.downsample.1.{{bn}}"),
        *head_rules(model, "fc"),
    ]
    for k, letter in enumerate("abc", start=1):
        rules.append(Rule(f"{theirs}.f.{letter}.0.weight", f"{ours}.conv{k}.weight"))
        rules.append(Rule(f"{theirs}.f.{letter}.1.{{bn}}", f"{ours}.bn{k}.{{bn}}"))
    return Table(rules, prefixes=_MODULE)


def regnet_of_timm(backbone: Any, model: Any) -> Table:
    """`RegNet`, timm's."""
    theirs, ours = "s{i}.b{j+1}", "backbone.layer{i}.{j}"
    rules = [
        Rule("stem.conv.weight", "backbone.conv1.weight"),
        Rule("stem.bn.{bn}", "backbone.bn1.{bn}"),
        Rule(f"{theirs}.conv{{k}}.conv.weight", f"{ours}.conv{{k}}.weight"),
        Rule(f"{theirs}.conv{{k}}.bn.{{bn}}", f"{ours}.bn{{k}}.{{bn}}"),
        Rule(f"{theirs}.downsample.conv.weight", f"{ours}.downsample.0.weight"),
        Rule(f"{theirs}.downsample.bn.{{bn}}", f"{ours}.downsample.1.{{bn}}"),
        *head_rules(model, "head.fc"),
    ]
    return Table(rules, prefixes=_MODULE)


def regnet_of_pycls(backbone: Any, model: Any) -> Table:
    """The release of `RegNet`, facebookresearch/pycls."""
    theirs, ours = "s{i}.b{j+1}", "backbone.layer{i}.{j}"
    rules = [
        Rule("stem.conv.weight", "backbone.conv1.weight"),
        Rule("stem.bn.{bn}", "backbone.bn1.{bn}"),
        Rule(f"{theirs}.proj.weight", f"{ours}.downsample.0.weight"),
        Rule(f"{theirs}.bn.{{bn}}", f"{ours}.downsample.1.{{bn}}"),
        *head_rules(model, "head.fc"),
    ]
    for k, letter in enumerate("abc", start=1):
        rules.append(Rule(f"{theirs}.f.{letter}.weight", f"{ours}.conv{k}.weight"))
        rules.append(Rule(f"{theirs}.f.{letter}_bn.{{bn}}", f"{ours}.bn{k}.{{bn}}"))
    return Table(rules, prefixes=_MODULE)


_RELATIVES = ("ResNeSt", "Res2Net", "RegNet")  # of ResNet, but no kinds of it: its tables are not for them
TABLES: dict[str, dict[str, Any]] = {
    "timm": {
        "DenseNet": densenet,
        "InceptionV3": inception_v3,
        "RegNet": regnet_of_timm,
        "Res2Net": res2net,
        "ResNeSt": resnest,
        "VGG": vgg_of_timm,
    },
    "torchvision": {
        "AlexNet": alexnet,
        "DenseNet": densenet,
        "InceptionV3": inception_v3,
        "RegNet": regnet,
        **dict.fromkeys(("ResNeSt", "Res2Net"), timm.nothing),
        "VGG": vgg,
    },
    "hf": dict.fromkeys(_RELATIVES, timm.nothing),
    "pycls": {"RegNet": regnet_of_pycls},
}
