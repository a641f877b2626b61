"""Runs a PyTorch model and ours on the same weights: `python convert/compare.py --model=NAME --src=file.pth --layout=timm`.

Prints, block by block, how far the outputs are apart, relative to the largest magnitude. Needs the library that the layout is
of (timm, torchvision, transformers, mmpretrain); without it, names, shapes and the way back are checked all the same.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.cli import ExpectedFailure
from jaxpretrain.tools.from_torch import local, model_config, needed

FLAGS = {
    "model": "a name of the zoo, a recipe, or a .json file, as for from_torch.py",
    "src": "a .pth or .safetensors file, or its URL",
    "layout": "whose names the file has: auto (default), mmpretrain, timm, torchvision, hf, ...",
    "key": "where the weights are inside a .pth file",
    "torch_model": "what the library calls the model (timm: vit_base_patch16_224; hf: a folder with config.json)",
    "size": "images of this many pixels (default: what the model is made for)",
    "tolerance": "largest error allowed, relative to the largest magnitude (default 1e-4)",
}
LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers", "mmpretrain": "mmpretrain"}
Row = tuple[str, str, tuple[int, ...], float]


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, FLAGS, {}, __doc__ or "")
    needed(flags, "model", "src")
    from jaxpretrain.interop import export, files, read_model

    src = local(flags.src)
    found = read_model(model_config(flags.model), src, layout=flags.layout or "auto", key=flags.key)
    model, report = found.filled(), found.report
    print(report)
    given, back = files.read(src, flags.key), export(model, report.layout)
    same = [name for name, array in back.items() if name in given and np.array_equal(given[name], array)]
    print(f"{len(same)} of {len(given)} tensors come back bit-identical; left out: {len(given) - len(back)}")
    library = LIBRARIES.get(report.layout)
    try:
        importlib.import_module(library or "")
    except (ImportError, ValueError, RuntimeError) as error:
        need = f"pip install {library}" if library else f"no library has the layout {report.layout!r}"
        raise ExpectedFailure(f"Outputs are not compared: {need} ({error})") from error
    theirs = library_model(report.layout, flags.torch_model or flags.model, src, given)
    size = int(flags.size) if flags.size else image_size(model)
    rows = compare(model, theirs, report.layout, size)
    print(table(rows))
    worst = max(error for *_, error in rows)
    print(f"largest difference {worst:.1e}")
    if not worst <= float(flags.tolerance or 1e-4):
        raise ExpectedFailure(f"The outputs are {worst:.1e} apart; the first row that is far off is where to look")
    return cli.OK


def library_model(layout: str, name: str, src: Any, state: Mapping[str, np.ndarray]) -> Any:
    """The library's own model with the weights of the file, in eval mode."""
    import torch

    if layout == "hf":  # whose names in files and in memory differ, so it has to load its files itself
        import transformers

        folder = name if Path(name).is_dir() else str(Path(src).parent)
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        return kind.from_pretrained(folder).eval()
    if layout == "timm":
        model = importlib.import_module("timm").create_model(name)
    elif layout == "torchvision":
        model = importlib.import_module("torchvision.models").get_model(name)
    else:
        model = importlib.import_module("mmpretrain").get_model(name)
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in state.items()}
    if missing := model.load_state_dict(tensors, strict=False).missing_keys:
        raise ExpectedFailure(
            f"{src} is not for the library's {name}: it lacks {', '.join(missing[:10])}; give --torch_model"
        )
    return model.eval()


def image_size(model: Any) -> int:
    """Pixels across of the images that the model's position table is for; 224 if it has none."""
    patch_embed = getattr(getattr(model, "backbone", model), "patch_embed", None)
    if patch_embed is None:
        return 224
    return patch_embed.init_out_size[0] * patch_embed.patch_size[0]


def compare(model: Any, theirs: Any, layout: str, size: int) -> list[Row]:
    """(our block, their module, shape, relative difference) for every block of ours that is a module there, and the end.

    Args:
        model: ours, in eval mode.
        theirs: the PyTorch module with the same weights, in eval mode.
        layout: its layout.
        size: pixels down and across of the images, which are standard normal noise.
    """
    import torch

    from jaxpretrain.models.layers import intermediates

    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    logits, found = intermediates(model, images, names="*.out")
    places = counterparts(model, theirs, layout, [name.removesuffix(".out") for name in found])
    outputs: dict[str, Any] = {}
    modules = dict(theirs.named_modules())
    for name in set(places.values()) & set(modules):
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: outputs.setdefault(name, _tensor(out)))
    with torch.no_grad():
        end = _tensor(theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))
    rows = []
    for block, place in places.items():
        if place in outputs:
            ours = np.asarray(found[f"{block}.out"])
            rows.append((block, place, ours.shape, difference(ours, outputs[place].numpy())))
    last = np.asarray(logits[-1] if isinstance(logits, tuple) else logits)
    return [*rows, ("(output)", "(output)", last.shape, difference(last, end.numpy()))]


def counterparts(model: Any, theirs: Any, layout: str, blocks: list[str]) -> dict[str, str]:
    """Our block -> the foreign module that holds the same weights, found by their values."""
    from jaxpretrain.interop import mmpretrain as hub
    from jaxpretrain.interop.fitting import for_export, table_of, with_root
    from jaxpretrain.interop.rules import translate

    state = with_root(hub.to_state_dict(model), model)
    foreign = for_export(table_of(layout, model), model)
    root = "" if hasattr(model, "backbone") else "backbone."
    held: dict[bytes, list[str]] = {}
    for name, tensor in theirs.state_dict().items():
        held.setdefault(tensor.numpy().tobytes(), []).append(name)
    found = {}
    for block in blocks:
        inside = {name: array for name, array in state.items() if name.startswith(f"{root}{block}.")}
        arrays = translate(inside, foreign, inverse=True).state.values()
        places = [held.get(np.ascontiguousarray(array).tobytes(), []) for array in arrays]
        if names := [place[0] for place in places if len(place) == 1]:  # biases of zeros are everywhere
            found[block] = _common_module(names)
    return found


def _common_module(names: list[str]) -> str:
    """The longest dotted path that all names are below."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest magnitude; NCHW maps and flattened ones are brought to ours. inf: other shape."""
    if theirs.ndim == 4 and ours.ndim == 4 and ours.shape != theirs.shape:
        theirs = theirs.transpose(0, 2, 3, 1)
    if ours.shape != theirs.shape and ours.size == theirs.size:
        theirs = theirs.reshape(ours.shape)
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def table(rows: list[Row]) -> str:
    """The rows in columns."""
    lines = [("ours", "theirs", "shape", "difference"), *((a, b, str(s), f"{e:.1e}") for a, b, s, e in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _tensor(output: Any) -> Any:
    """The tensor that a module of whatever library gives."""
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name).detach()
    while isinstance(output, tuple | list):
        output = output[0]
    if not hasattr(output, "detach"):
        raise ConfigError(f"A module gave {type(output).__name__}, which cannot be compared")
    return output.detach()


if __name__ == "__main__":
    sys.exit(cli.run(main))
