"""`tools.visualize_reconstruction` on a tiny MAE that is trained here, and on methods of other kinds."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.config import load_config
from jaxpretrain.tools import checkpoints
from jaxpretrain.tools.visualize_reconstruction import main, reconstruct
from jaxpretrain.trainer import train

ARCH = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32)


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    """The workdir of two steps of the recipe for digits, made smaller."""
    path = tmp_path_factory.mktemp("mae")
    config = load_config("configs/mae.py:digits", {"method.backbone.arch": ARCH, "max_steps": 2, "tensorboard": False})
    with config.unlocked():
        config.method.neck.embed_dim = 16
    config.evaluators, config.checkpoint.interval = dict(), 1
    config.evaluation.at_start = False
    train(config, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three pictures of other sizes than the network's."""
    rng = np.random.default_rng(0)
    for i, shape in enumerate(((40, 40, 3), (60, 30, 3), (32, 32))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def patches(picture):
    """[rows, 16, columns, 16, 3] of a column of 128 pixels: the network's patches of 4 pixels, enlarged."""
    return picture.reshape(8, 16, 8, 16, 3)


def draw(folder, *arguments, out="picture.png"):
    assert main([str(folder), f"--out-file={folder / 'out' / out}", *map(str, arguments)]) == cli.OK
    return np.asarray(Image.open(folder / "out" / out))


def test_original_masked_and_reconstructed_side_by_side(mae, folder, capsys):
    picture = draw(folder, f"--checkpoint={mae}")
    assert "masked_mse" in capsys.readouterr().out
    cell = 128 + 8
    assert picture.shape[1] == 4 * cell + 8 and (picture.shape[0] - 3 * cell) < 60  # four columns, three rows
    top = picture.shape[0] - 3 * cell
    columns = [picture[top : top + 128, 8 + i * cell : 136 + i * cell] for i in range(4)]
    shown = np.asarray(Image.open(folder / "0.png").resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    original = columns[0][2::4, 2::4].astype(int)
    assert np.abs(original - shown).mean() < 20  # another filter, the same picture
    same = np.all(patches(columns[1]) == patches(columns[0]), axis=(1, 3, 4))
    assert same.sum() == int(64 * (1 - 0.6))
    for shown, told in (
        (columns[0], same),
        (columns[2], ~same),
    ):  # what was seen, and what the network says of the rest
        np.testing.assert_array_equal(patches(columns[3]).swapaxes(1, 2)[told], patches(shown).swapaxes(1, 2)[told])


def test_masks_follow_ratio_and_seed(mae, folder):
    first, again, other, few = (
        draw(folder, f"--checkpoint={mae}", *options, out=f"{i}.png")
        for i, options in enumerate(((), (), ("--seed=1",), ("--mask-ratio=0.25",)))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    top = first.shape[0] - 3 * 136
    seen = [
        np.all(patches(p[top : top + 128, 144:272]) == patches(p[top : top + 128, 8:136]), axis=(1, 3, 4)).sum()
        for p in (first, few)
    ]
    assert seen == [25, 48]  # of 64 patches


def test_size_limits_and_single_files(mae, folder):
    picture = draw(folder, f"--checkpoint={mae}", "--max-images=1")
    assert picture.shape[0] < 200
    out = folder / "single.png"
    assert main([f"--img-path={folder / '0.png'}", f"--checkpoint={mae}", f"--out-file={out}"]) == cli.OK
    np.testing.assert_array_equal(np.asarray(Image.open(out)), picture)


@pytest.mark.slow
@pytest.mark.parametrize("name, titles", [("simmim", 4), ("maskfeat", 4)])
def test_masks_come_from_the_generator_of_the_recipe(name, titles, folder):
    spec = f"configs/{name}.py:digits=untrained"
    try:
        checkpoint = checkpoints.resolve(spec)
    except ConfigError as error:
        pytest.skip(str(error))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    columns, scores = reconstruct(checkpoint, pixels)
    assert len(columns) == titles and list(columns)[:2] == ["original", "masked"] and scores
    again, _ = reconstruct(checkpoint, pixels)
    other, _ = reconstruct(checkpoint, pixels, seed=1)
    np.testing.assert_array_equal(columns["masked"], again["masked"])
    assert (columns["masked"] != other["masked"]).any()
    hidden = (columns["masked"] == 0).all(axis=3).mean()
    few = (reconstruct(checkpoint, pixels, mask_ratio=0.2)[0]["masked"] == 0).all(axis=3).mean()
    assert few < hidden and abs(few - 0.2) < 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Give images and --checkpoint"),
        (["--checkpoint=configs/mae.py:digits=untrained"], "Give images and --checkpoint"),
        (["{folder}", "--checkpoint=configs/simclr.py:digits=untrained"], "needs a method with `reconstruct`.*SimCLR"),
        (["{folder}", "--checkpoint=configs/mae.py:digits=untrained", "--mask-ratio=2"], "must be between 0 and 1"),
    ],
)
def test_mistakes_are_named(arguments, message, folder):
    with pytest.raises(ConfigError, match=message):
        main([argument.format(folder=folder) for argument in arguments])
