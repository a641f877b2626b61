"""Classifies an image: `python -m jaxpretrain.tools.image_demo IMAGE MODEL [--checkpoint=FILE] [--device=cpu]`.

IMAGE is a path or URL, MODEL a name of the zoo (see `jaxpretrain.list_models`) or a configuration file. Prints the class, its
number and its score as JSON, and saves the picture with them written on it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jaxpretrain import cli
from jaxpretrain.build import ConfigError

FLAGS = {
    "checkpoint": "weights: a .pth or .safetensors file, a URL, or a directory of ours (default: the published ones)",
    "device": "cpu, gpu, cuda:1, ... (default: JAX's)",
    "show-dir": "folder for the picture (default: demo_results)",
}
SWITCHES = {"show": "open the picture"}


def main(argv: list[str]) -> int:
    given, rest = cli.positional(argv, FLAGS)
    flags = cli.parse(rest, FLAGS, SWITCHES, __doc__ or "")
    if len(given) != 2:
        raise ConfigError(f"Give IMAGE and MODEL, in this order; got {' '.join(given) or 'neither'} (--help says more)")
    image, model = given
    from jaxpretrain.inference import inference_model

    folder = Path(flags.values.get("show-dir", "demo_results"))
    result = inference_model(
        model,
        image,
        pretrained=flags.checkpoint or True,
        device=flags.device,
        show=bool(flags.show),
        show_dir=folder,
    )
    del result["pred_scores"]
    print(json.dumps(result, indent=2, ensure_ascii=False))
    print(f"The picture is in {folder}", file=sys.stderr)
    return cli.OK


if __name__ == "__main__":
    sys.exit(cli.run(main))
