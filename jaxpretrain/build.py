"""dict(type=...) -> object. One lazy table says where each name lives; nothing is imported before it is asked for."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake in a configuration: the message says what is wrong, where, and what to do."""


# Name -> module. A class has the same name there, unless one follows a colon.
_TABLE: dict[str, str] = {
    # backbones
    "ResNet": "jaxpretrain.models.resnet",
    "ResNetV1c": "jaxpretrain.models.resnet",
    "ResNetV1d": "jaxpretrain.models.resnet",
    "ResNet_CIFAR": "jaxpretrain.models.resnet_cifar",
    "ResNeXt": "jaxpretrain.models.resnext",
    "SEResNet": "jaxpretrain.models.seresnet",
    "SEResNeXt": "jaxpretrain.models.seresnet",
    "VisionTransformer": "jaxpretrain.models.vision_transformer",
    "DistilledVisionTransformer": "jaxpretrain.models.deit",
    "DeiT3": "jaxpretrain.models.deit3",
    "ViTEVA02": "jaxpretrain.models.vit_eva02",
    "ViTSAM": "jaxpretrain.models.vit_sam",
    "BEiTViT": "jaxpretrain.models.beit",
    "SwinTransformer": "jaxpretrain.models.swin_transformer",
    "SwinTransformerV2": "jaxpretrain.models.swin_transformer_v2",
    "EfficientNet": "jaxpretrain.models.efficientnet",
    "EfficientNetV2": "jaxpretrain.models.efficientnet_v2",
    "EfficientFormer": "jaxpretrain.models.efficientformer",
    "LeViT": "jaxpretrain.models.levit",
    "TinyViT": "jaxpretrain.models.tinyvit",
    "PoolFormer": "jaxpretrain.models.poolformer",
    "RIFormer": "jaxpretrain.models.riformer",
    "ConvNeXt": "jaxpretrain.models.convnext",
    "SparseConvNeXt": "jaxpretrain.models.sparse_convnext",
    "SparseResNet": "jaxpretrain.models.sparse_resnet",
    "ConvMixer": "jaxpretrain.models.convmixer",
    "HorNet": "jaxpretrain.models.hornet",
    "HiViT": "jaxpretrain.models.hivit",
    "MixMIMTransformer": "jaxpretrain.models.mixmim",
    "Vig": "jaxpretrain.models.vig",
    "PyramidVig": "jaxpretrain.models.vig",
    "MlpMixer": "jaxpretrain.models.mlp_mixer",
    "VAN": "jaxpretrain.models.van",
    "XCiT": "jaxpretrain.models.xcit",
    "RevVisionTransformer": "jaxpretrain.models.revvit",
    "RepVGG": "jaxpretrain.models.repvgg",
    "MobileOne": "jaxpretrain.models.mobileone",
    "RepLKNet": "jaxpretrain.models.replknet",
    "RepMLPNet": "jaxpretrain.models.repmlp",
    "AlexNet": "jaxpretrain.models.alexnet",
    "LeNet5": "jaxpretrain.models.lenet",
    "VGG": "jaxpretrain.models.vgg",
    "DenseNet": "jaxpretrain.models.densenet",
    "InceptionV3": "jaxpretrain.models.inception_v3",
    "ResNeSt": "jaxpretrain.models.resnest",
    "Res2Net": "jaxpretrain.models.res2net",
    "RegNet": "jaxpretrain.models.regnet",
    "MobileNetV2": "jaxpretrain.models.mobilenet_v2",
    "MobileNetV3": "jaxpretrain.models.mobilenet_v3",
    "ShuffleNetV1": "jaxpretrain.models.shufflenet_v1",
    "ShuffleNetV2": "jaxpretrain.models.shufflenet_v2",
    "MobileViT": "jaxpretrain.models.mobilevit",
    "EdgeNeXt": "jaxpretrain.models.edgenext",
    "HRNet": "jaxpretrain.models.hrnet",
    "CSPDarkNet": "jaxpretrain.models.cspnet",
    "CSPResNet": "jaxpretrain.models.cspnet",
    "CSPResNeXt": "jaxpretrain.models.cspnet",
    "T2T_ViT": "jaxpretrain.models.t2t_vit",
    "TNT": "jaxpretrain.models.tnt",
    "PCPVT": "jaxpretrain.models.twins",
    "SVT": "jaxpretrain.models.twins",
    "MViT": "jaxpretrain.models.mvit",
    "Conformer": "jaxpretrain.models.conformer",
    "DaViT": "jaxpretrain.models.davit",
    "MAEViT": "jaxpretrain.methods.mae",
    "MoCoV3ViT": "jaxpretrain.methods.mocov3",
    "SimMIMSwinTransformer": "jaxpretrain.methods.simmim",
    "MaskFeatViT": "jaxpretrain.methods.maskfeat",
    "MFFViT": "jaxpretrain.methods.mff",
    "MILANViT": "jaxpretrain.methods.milan",
    "MAEHiViT": "jaxpretrain.methods.mae_hivit",
    "iTPNHiViT": "jaxpretrain.methods.itpn",
    "MixMIMPretrainTransformer": "jaxpretrain.methods.mixmim",
    "BEiTPretrainViT": "jaxpretrain.methods.beit",
    "CAEPretrainViT": "jaxpretrain.methods.cae",
    "IJEPAViT": "jaxpretrain.methods.ijepa",
    "Data2VecViT": "jaxpretrain.methods.data2vec",
    "IBOTViT": "jaxpretrain.methods.ibot",
    "ResNetSobel": "jaxpretrain.methods.deepcluster",
    # necks
    "GlobalAveragePooling": "jaxpretrain.models.necks",
    "GeneralizedMeanPooling": "jaxpretrain.models.necks",
    "ClsBatchNormNeck": "jaxpretrain.models.necks",
    "LinearNeck": "jaxpretrain.models.necks",
    "LinearReduction": "jaxpretrain.models.necks",
    "NonLinearNeck": "jaxpretrain.models.necks",
    "HRFuseScales": "jaxpretrain.models.hrnet",
    "MAEPretrainDecoder": "jaxpretrain.methods.mae",
    "MoCoV2Neck": "jaxpretrain.methods.moco",
    "DenseCLNeck": "jaxpretrain.methods.densecl",
    "SwAVNeck": "jaxpretrain.methods.swav",
    "RelativeLocNeck": "jaxpretrain.methods.relative_loc",
    "ODCNeck": "jaxpretrain.methods.odc",
    "SimMIMLinearDecoder": "jaxpretrain.methods.simmim",
    "MILANPretrainDecoder": "jaxpretrain.methods.milan",
    "SparKLightDecoder": "jaxpretrain.methods.spark",
    "FCMAEDecoder": "jaxpretrain.methods.fcmae",
    "iTPNPretrainDecoder": "jaxpretrain.methods.itpn",
    "MixMIMPretrainDecoder": "jaxpretrain.methods.mixmim",
    "BEiTV2Neck": "jaxpretrain.methods.beit",
    "CAENeck": "jaxpretrain.methods.cae",
    "DINONeck": "jaxpretrain.methods.dino",
    "IBOTNeck": "jaxpretrain.methods.ibot",
    "DINOv2Neck": "jaxpretrain.methods.dinov2",
    "IJEPAPredictor": "jaxpretrain.methods.ijepa",
    "Data2VecDecoder": "jaxpretrain.methods.data2vec",
    # heads
    "ClsHead": "jaxpretrain.models.heads",
    "LinearClsHead": "jaxpretrain.models.heads",
    "StackedLinearClsHead": "jaxpretrain.models.heads",
    "EfficientFormerClsHead": "jaxpretrain.models.heads",
    "LeViTClsHead": "jaxpretrain.models.levit",
    "VigClsHead": "jaxpretrain.models.vig",
    "MultiTaskHead": "jaxpretrain.models.heads",
    "MultiLabelClsHead": "jaxpretrain.models.multi_label_heads",
    "MultiLabelLinearClsHead": "jaxpretrain.models.multi_label_heads",
    "CSRAClsHead": "jaxpretrain.models.multi_label_heads",
    "ArcFaceClsHead": "jaxpretrain.models.margin_head",
    "VisionTransformerClsHead": "jaxpretrain.models.heads",
    "DeiTClsHead": "jaxpretrain.models.deit",
    "ConformerHead": "jaxpretrain.models.conformer",
    "MAEPretrainHead": "jaxpretrain.methods.mae",
    "ContrastiveHead": "jaxpretrain.methods.simclr",
    "MoCoV3Head": "jaxpretrain.methods.mocov3",
    "LatentCrossCorrelationHead": "jaxpretrain.methods.barlowtwins",
    "LatentPredictHead": "jaxpretrain.methods.byol",
    "SwAVHead": "jaxpretrain.methods.swav",
    "SimMIMHead": "jaxpretrain.methods.simmim",
    "MIMHead": "jaxpretrain.methods.milan",
    "SparKPretrainHead": "jaxpretrain.methods.spark",
    "iTPNClipHead": "jaxpretrain.methods.itpn",
    "MixMIMPretrainHead": "jaxpretrain.methods.mixmim",
    "BEiTV1Head": "jaxpretrain.methods.beit",
    "BEiTV2Head": "jaxpretrain.methods.beit",
    "CAEHead": "jaxpretrain.methods.cae",
    "IJEPAHead": "jaxpretrain.methods.ijepa",
    "Data2VecHead": "jaxpretrain.methods.data2vec",
    "DINOHead": "jaxpretrain.methods.dino",
    "IBOTHead": "jaxpretrain.methods.ibot",
    "DINOv2Head": "jaxpretrain.methods.dinov2",
    "VICRegHead": "jaxpretrain.methods.vicreg",
    # losses
    "CrossEntropyLoss": "jaxpretrain.models.losses",
    "LabelSmoothLoss": "jaxpretrain.models.losses",
    "FocalLoss": "jaxpretrain.models.losses",
    "AsymmetricLoss": "jaxpretrain.models.losses",
    "SeesawLoss": "jaxpretrain.models.losses",
    "PixelReconstructionLoss": "jaxpretrain.models.losses",
    "CrossCorrelationLoss": "jaxpretrain.methods.barlowtwins",
    "CosineSimilarityLoss": "jaxpretrain.methods.byol",
    "SwAVLoss": "jaxpretrain.methods.swav",
    "CAELoss": "jaxpretrain.methods.cae",
    "VICRegLoss": "jaxpretrain.methods.vicreg",
    "KoLeoLoss": "jaxpretrain.methods.dinov2",
    # target generators and memories
    "HOGGenerator": "jaxpretrain.methods.maskfeat",
    "CLIPGenerator": "jaxpretrain.models.clip_generator",
    "VQKD": "jaxpretrain.models.vqkd",
    "RandomProjectionTokenizer": "jaxpretrain.methods.visual_tokens",
    "DALL-E": "jaxpretrain.models.dalle:DALLEEncoder",
    "SimpleMemory": "jaxpretrain.methods.npid",
    "ODCMemory": "jaxpretrain.methods.odc",
    "Kmeans": "jaxpretrain.methods.kmeans",
    # classifiers and methods
    "ImageClassifier": "jaxpretrain.models.classifiers",
    "ImageToImageRetriever": "jaxpretrain.models.retrievers",
    "LoRAModel": "jaxpretrain.models.lora",
    "Supervised": "jaxpretrain.methods.supervised",
    "MAE": "jaxpretrain.methods.mae",
    "SimCLR": "jaxpretrain.methods.simclr",
    "MoCoV3": "jaxpretrain.methods.mocov3",
    "BarlowTwins": "jaxpretrain.methods.barlowtwins",
    "SimSiam": "jaxpretrain.methods.simsiam",
    "BYOL": "jaxpretrain.methods.byol",
    "MoCo": "jaxpretrain.methods.moco",
    "DenseCL": "jaxpretrain.methods.densecl",
    "SwAV": "jaxpretrain.methods.swav",
    "NPID": "jaxpretrain.methods.npid",
    "RelativeLoc": "jaxpretrain.methods.relative_loc",
    "RotationPred": "jaxpretrain.methods.rotation_pred",
    "DeepCluster": "jaxpretrain.methods.deepcluster",
    "ODC": "jaxpretrain.methods.odc",
    "SimMIM": "jaxpretrain.methods.simmim",
    "MaskFeat": "jaxpretrain.methods.maskfeat",
    "MFF": "jaxpretrain.methods.mff",
    "MILAN": "jaxpretrain.methods.milan",
    "SparK": "jaxpretrain.methods.spark",
    "FCMAE": "jaxpretrain.methods.fcmae",
    "EVA": "jaxpretrain.methods.eva",
    "iTPN": "jaxpretrain.methods.itpn",
    "MixMIM": "jaxpretrain.methods.mixmim",
    "BEiT": "jaxpretrain.methods.beit",
    "CAE": "jaxpretrain.methods.cae",
    "DINO": "jaxpretrain.methods.dino",
    "IBOT": "jaxpretrain.methods.ibot",
    "DINOv2": "jaxpretrain.methods.dinov2",
    "IJEPA": "jaxpretrain.methods.ijepa",
    "Data2Vec2": "jaxpretrain.methods.data2vec",
    "VICReg": "jaxpretrain.methods.vicreg",
    # batch augmentations
    "Mixup": "jaxpretrain.data.batch_augments",
    "CutMix": "jaxpretrain.data.batch_augments",
    "ResizeMix": "jaxpretrain.data.batch_augments",
    # optimizers and schedules
    "SGD": "jaxpretrain.optim.optimizers",
    "Adam": "jaxpretrain.optim.optimizers",
    "AdamW": "jaxpretrain.optim.optimizers",
    "RMSprop": "jaxpretrain.optim.optimizers",
    "Lamb": "jaxpretrain.optim.optimizers",
    "LARS": "jaxpretrain.optim.optimizers",
    "LinearLR": "jaxpretrain.optim.schedules",
    "CosineAnnealingLR": "jaxpretrain.optim.schedules",
    "MultiStepLR": "jaxpretrain.optim.schedules",
    "ConstantLR": "jaxpretrain.optim.schedules",
    "StepLR": "jaxpretrain.optim.schedules",
    "ExponentialLR": "jaxpretrain.optim.schedules",
    "PolyLR": "jaxpretrain.optim.schedules",
    "CosineAnnealingWeightDecay": "jaxpretrain.optim.schedules",
    "CosineAnnealingParamScheduler": "jaxpretrain.optim.schedules",
    # data sets
    "Digits": "jaxpretrain.data.sources",
    "CustomDataset": "jaxpretrain.data.sources",
    "ImageNet": "jaxpretrain.data.sources",
    "CIFAR10": "jaxpretrain.data.sources",
    "CIFAR100": "jaxpretrain.data.sources",
    "MNIST": "jaxpretrain.data.sources",
    "FashionMNIST": "jaxpretrain.data.sources",
    "ArrayRecordDataset": "jaxpretrain.data.sources",
    "TFDSDataset": "jaxpretrain.data.sources",
    "WebDataset": "jaxpretrain.data.webdataset",
    "ParquetDataset": "jaxpretrain.data.parquet",
    "VOC": "jaxpretrain.data.voc",
    "BaseDataset": "jaxpretrain.data.annotated",
    "MultiLabelDataset": "jaxpretrain.data.annotated",
    "MultiTaskDataset": "jaxpretrain.data.annotated",
    "ImageList": "jaxpretrain.data.annotated",
    "ConcatDataset": "jaxpretrain.data.wrappers",
    "RepeatDataset": "jaxpretrain.data.wrappers",
    "ClassBalancedDataset": "jaxpretrain.data.wrappers",
    "KFoldDataset": "jaxpretrain.data.wrappers",
    "ImageNet21k": "jaxpretrain.data.scenes_and_objects",
    "DeepClusterImageNet": "jaxpretrain.data.sources:ImageNet",
    "CUB": "jaxpretrain.data.fine_grained",
    "StanfordCars": "jaxpretrain.data.fine_grained",
    "FGVCAircraft": "jaxpretrain.data.fine_grained",
    "Flowers102": "jaxpretrain.data.fine_grained",
    "OxfordIIITPet": "jaxpretrain.data.fine_grained",
    "Food101": "jaxpretrain.data.fine_grained",
    "iNaturalist2018": "jaxpretrain.data.fine_grained",
    "SUN397": "jaxpretrain.data.scenes_and_objects",
    "Places205": "jaxpretrain.data.scenes_and_objects",
    "DTD": "jaxpretrain.data.scenes_and_objects",
    "Caltech101": "jaxpretrain.data.scenes_and_objects",
    "InShop": "jaxpretrain.data.in_shop",
    "Subset": "jaxpretrain.data.subset",
    "CachedDataset": "jaxpretrain.data.cache",
    # evaluators
    "Accuracy": "jaxpretrain.evaluators.accuracy",
    "AveragePrecision": "jaxpretrain.evaluators.multi_label",
    "MultiLabelMetric": "jaxpretrain.evaluators.multi_label",
    "VOCAveragePrecision": "jaxpretrain.evaluators.multi_label",
    "VOCMultiLabelMetric": "jaxpretrain.evaluators.multi_label",
    "MultiTasksMetric": "jaxpretrain.evaluators.multi_task",
    "KNN": "jaxpretrain.evaluators.knn",
    "LinearProbe": "jaxpretrain.evaluators.linear_probe",
    "Reconstruction": "jaxpretrain.evaluators.reconstruction",
    "AttentionMaps": "jaxpretrain.evaluators.attention_maps",
    "LevelProbe": "jaxpretrain.evaluators.levels",
    "LowShotSVM": "jaxpretrain.evaluators.low_shot_svm",
    "FeatureStatistics": "jaxpretrain.evaluators.feature_statistics",
    "NearestNeighbours": "jaxpretrain.evaluators.nearest_neighbours",
    "Encoder": "jaxpretrain.evaluators.encoder",
    "FineTuned": "jaxpretrain.evaluators.encoder",
}

_REGISTERED: dict[str, Any] = {}


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean X?' with the closest valid names, or the list of valid names where none is close."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if not close:  # difflib is case sensitive; a name in the wrong case is the most common slip
        close = [v for v in valid if v.lower() == name.lower()]
    if close:
        return f" Did you mean {' or '.join(repr(c) for c in close)}?"
    return f" Valid: {', '.join(valid) if len(valid) <= 40 else ', '.join(valid[:40]) + ', ...'}."


def register(name: str | None = None) -> Callable[[T], T]:
    """Decorator that adds a class or function of the user's to the table, under `name` or its own name."""

    def add(component: T) -> T:
        _REGISTERED[name or component.__name__] = component  # type: ignore[attr-defined]
        return component

    return add


def names() -> list[str]:
    """Every name that `resolve` knows, sorted."""
    return sorted({*_TABLE, *_REGISTERED})


def resolve(name: str) -> Any:
    """The class or function called `name`: from the table, registered by the user, or a dotted path `package.module.Name`.

    Raises ConfigError naming the nearest known names.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in _TABLE:
        module, _, attribute = _TABLE[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"type {name!r} looks like a dotted path, but cannot be imported: {error}") from error
    raise ConfigError(f"Unknown type {name!r}.{nearest(name, names())}")


def build(cfg: Any, **defaults: Any) -> Any:
    """Builds the object that `cfg` describes: `build(dict(type='ResNet', depth=50))`.

    Args:
        cfg: a mapping with `type` (a name, or the class itself); its other keys are the arguments. An object that is not a
            mapping is returned as it is, so built parts and descriptions can be mixed.
        defaults: arguments that the caller supplies where `cfg` does not and the class takes them (`rngs`, `context`, ...).

    Raises:
        ConfigError: unknown type, or an argument that the class does not take, naming the nearest valid one.
    """
    if not isinstance(cfg, Mapping) and not hasattr(cfg, "to_dict"):
        return cfg
    args = dict(cfg.to_dict() if hasattr(cfg, "to_dict") else cfg)
    if "type" not in args:
        raise ConfigError(f"A component needs a 'type'; got only {sorted(args)}")
    kind = args.pop("type")
    component = resolve(kind) if isinstance(kind, str) else kind
    accepted, open_ended = _parameters(component)
    for name, value in defaults.items():
        if name in accepted or open_ended:
            args.setdefault(name, value)
    if "rngs" in accepted and "rngs" not in args:
        from flax import nnx

        args["rngs"] = nnx.Rngs(0)
    label = kind if isinstance(kind, str) else kind.__name__
    for name in args:
        if name not in accepted and not open_ended:
            raise ConfigError(f"{label} has no argument {name!r}.{nearest(name, accepted)}")
    missing = [name for name, required in accepted.items() if required and name not in args]
    if missing:
        raise ConfigError(f"{label} needs {', '.join(missing)}; its arguments are {', '.join(accepted)}")
    return component(**args)


class _OneKey:
    """Stands for `nnx.Rngs` where only shapes count: tracing the counters of every draw is what takes the time."""

    def __init__(self, key: Any):
        self._key = key

    def __getattr__(self, stream: str) -> Callable[[], Any]:
        return lambda: self._key


def abstract(cfg: Any, **defaults: Any) -> Any:
    """The module that `build(cfg, **defaults)` gives, with shapes (`jax.ShapeDtypeStruct`) in place of arrays.

    As `nnx.eval_shape`, several times as fast.
    """
    import jax
    from flax import nnx

    return nnx.eval_shape(lambda: build(cfg, rngs=_OneKey(jax.random.key(0)), **defaults))


def accepted_arguments(kind: str) -> tuple[str, ...]:
    """The argument names of the component called `kind`, without `rngs`; empty if there is none of that name."""
    try:
        return tuple(name for name in _parameters(resolve(kind))[0] if name != "rngs")
    except ConfigError:
        return ()


_NO_KEYWORD = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)


def _parameters(component: Callable) -> tuple[dict[str, bool], bool]:
    """The parameters of a class or function: name -> required; and whether it takes any keyword.

    `**kwargs` of a class mean those of its parent, so they are looked up along the method resolution order; unless it has
    `hands_arguments_on = True`, for then they may be any.
    """
    functions = [component]
    if inspect.isclass(component):
        functions = [cls.__dict__["__init__"] for cls in component.__mro__ if "__init__" in cls.__dict__]
    accepted: dict[str, bool] = {}
    for function in functions:
        open_ended = False
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return accepted, True
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                open_ended = True
            elif parameter.kind not in _NO_KEYWORD and parameter.name != "self":
                accepted.setdefault(parameter.name, parameter.default is inspect.Parameter.empty)
        if not open_ended:
            return accepted, False
    return accepted, getattr(component, "hands_arguments_on", not inspect.isclass(component))
