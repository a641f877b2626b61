"""Writes weights for PyTorch: `python convert/to_torch.py --checkpoint=DIR --dst=file.pth --layout=mmpretrain`.

DIR is what `from_torch.py` wrote, or the workdir of a training run, of which the averaged weights are taken if there are any;
or a file in another layout, with --model. Weights in a form for inference (`reparameterize_model`) are written as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxpretrain import __version__, cli
from jaxpretrain.build import ConfigError
from jaxpretrain.tools.from_torch import model_config, needed

FLAGS = {
    "checkpoint": "a directory of converted weights, a workdir, or a .pth or .safetensors file",
    "dst": "the file to write: .pth or .safetensors",
    "layout": "whose names to use: mmpretrain (default), timm, torchvision, hf, ...",
    "step": "which checkpoint of a workdir: latest (default), best or a step",
    "model": "what the weights are of, if no directory says it: as of from_torch.py",
    "part": "write this part alone: backbone",
}


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, FLAGS, {}, __doc__ or "")
    needed(flags, "checkpoint", "dst")
    from jaxpretrain.interop import export, files, read_model

    source = Path(flags.checkpoint)
    if not (source.is_dir() or (source.is_file() and flags.model)):
        what = "a file: say with --model what it holds weights of" if source.is_file() else "not a directory"
        raise ConfigError(f"--checkpoint={source} is {what}; give converted weights or a run's workdir")
    found = read_model(model_config(flags.model) if flags.model else saved_config(source), source, key=flags.step)
    print(found.report)
    model = found.filled()
    state = export(getattr(model, flags.part) if flags.part else model, flags.layout or "mmpretrain")
    meta = dict(jaxpretrain=__version__, model=found.config) if (flags.layout or "mmpretrain") == "mmpretrain" else None
    files.write(flags.dst, state, meta)
    print(f"{len(state)} tensors written to {flags.dst} (layout {flags.layout or 'mmpretrain'})")
    return cli.OK


def saved_config(directory: Path) -> dict[str, Any]:
    """The model that a directory holds weights of, as `model.json` or a run's `config.json` says."""
    for name, key in (("model.json", "model"), ("config.json", "method")):
        if (directory / name).exists() and (config := json.loads((directory / name).read_text()).get(key)):
            return config["model"] if config.get("type") == "Supervised" else config
    raise ConfigError(f"{directory} does not say which model it holds; give --model=NAME")


if __name__ == "__main__":
    sys.exit(cli.run(main))
