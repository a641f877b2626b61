"""Converts PyTorch weights: `python convert/from_torch.py --model=NAME --src=file.pth --dst=DIR [--layout=auto]`.

The result is a directory that `jaxpretrain.get_model(NAME, pretrained=DIR)` and `--config.load_from=DIR` read. The layout
(MMPretrain, timm, torchvision, Hugging Face, the papers' own) is recognised from the names in the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxpretrain import cli
from jaxpretrain.build import ConfigError

FLAGS = {
    "model": "a name of the zoo, a recipe (configs/mae.py:RECIPE), or a .json file with dict(type=...)",
    "src": "a .pth or .safetensors file, or its URL",
    "dst": "the directory to write; it must not exist yet",
    "layout": "whose names the file has: auto (default), mmpretrain, timm, torchvision, hf, dinov2, mae, clip, ...",
    "key": "where the weights are inside a .pth file, e.g. teacher or ema_state_dict (default: found)",
    "part": "take this part of the file alone: backbone",
    "drop": "names in the file to leave out: regular expressions, separated by commas",
}
SWITCHES = {"reinit_head": "start a new head instead of the file's, e.g. for another number of classes"}


def main(argv: list[str]) -> int:
    flags = cli.parse(
        [argument.replace("--reinit-head", "--reinit_head") for argument in argv], FLAGS, SWITCHES, __doc__
    )
    needed(flags, "model", "src", "dst")
    from jaxpretrain.interop import read_model, save_weights

    config = model_config(flags.model)
    if flags.part and "backbone" in config:
        config = config[flags.part]
    found = read_model(
        config,
        local(flags.src),
        layout=flags.layout or "auto",
        key=flags.key,
        part=flags.part,
        drop=flags.drop.split(",") if flags.drop else (),
        reinit_head=bool(flags.reinit_head),
    )
    report = found.report
    print(report)
    if note := zoo_note(flags.model):
        print(f"note: {note}")
    meta = dict(name=flags.model, model=found.config, fused=found.fused, layout=report.layout, source=str(flags.src))
    save_weights(found.model, flags.dst, meta=meta, report=report, progress=True)
    print(f"written to {flags.dst}")
    return cli.OK


def needed(flags: cli.Flags, *names: str) -> None:
    """Raises ConfigError if one of these flags was not given."""
    if missing := [name for name in names if not getattr(flags, name)]:
        raise ConfigError(f"--{missing[0]} is needed; --help lists all flags")


def model_config(name: str) -> dict[str, Any]:
    """The `dict(type=...)` that a zoo name, a recipe or a .json file stands for; a classifier rather than `Supervised`."""
    if name.endswith(".json"):
        config: Any = json.loads(Path(name).read_text())
        config = config.get("model", config)
    elif ".py" in name:
        from jaxpretrain.config import load_config

        config = load_config(name).method.to_dict()
    else:
        from jaxpretrain.zoo import model_info

        config = model_info(name).model
    return config["model"] if config.get("type") == "Supervised" else config


def zoo_note(name: str) -> str | None:
    """What the zoo says about a model before one uses its weights."""
    from jaxpretrain.zoo import model_info
    from jaxpretrain.zoo.index import is_model_name

    return model_info(name).note if is_model_name(name) else None


def local(src: str) -> str | Path:
    """`src`, downloaded if it is a URL."""
    from jaxpretrain.zoo.download import download, is_url
    from jaxpretrain.zoo.index import weights_hash

    return download(src, sha256=weights_hash(src)) if is_url(src) else src


if __name__ == "__main__":
    sys.exit(cli.run(main))
