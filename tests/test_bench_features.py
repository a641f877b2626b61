"""`tools.bench_features` from end to end: a workdir of a tiny run, converted and foreign files, folders and digits."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaxpretrain import cli
from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.data.subset import labels_of
from jaxpretrain.interop import export, files, save_weights
from jaxpretrain.optim.param_groups import param_groups
from jaxpretrain.recipes import recipe
from jaxpretrain.sharding import make_mesh
from jaxpretrain.tools import bench_features, checkpoints
from jaxpretrain.tools.bench_features import labelled_data, main
from jaxpretrain.tools.fine_tuning import Settings, grid_config
from jaxpretrain.trainer import train
from jaxpretrain.visualize.bench import plot_bench
from tests.test_voc import make_voc
from tests.tiny import tiny_config

VIT = dict(
    type="VisionTransformer",
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
    img_size=8,
    patch_size=4,
)
CLASSIFIER = dict(
    type="ImageClassifier", backbone=VIT, head=dict(type="VisionTransformerClsHead", num_classes=10, in_channels=16)
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of ten steps."""
    path = tmp_path_factory.mktemp("run")
    train(tiny_config(checkpoint=dict(interval=1), mesh=dict(data=-1)), path)
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """(folder, classifier): a .json of its configuration, and its weights in several forms."""
    folder = tmp_path_factory.mktemp("vit")
    (folder / "vit.json").write_text(json.dumps(CLASSIFIER))
    model = build(CLASSIFIER, rngs=nnx.Rngs(1))
    model.init_weights(nnx.Rngs(1))
    files.write(folder / "whole.safetensors", export(model, "mmpretrain"))
    files.write(folder / "encoder.safetensors", export(model.backbone, "mmpretrain"))
    save_weights(model, folder / "converted", meta=dict(model=CLASSIFIER))
    return folder, model


@pytest.fixture(autouse=True)
def no_console(monkeypatch):
    """Its handler would outlive the test, and with it the stream that pytest takes away."""
    monkeypatch.setattr("jaxpretrain.logs.setup_logging", lambda: None)


def table(out: Path) -> dict[str, list[str]]:
    """{title: cells} of the Markdown table; the head under ''."""
    lines = [line for line in (out / "bench.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == cli.OK


# ------------------------------------------------------------------------------------------------ end to end


def test_one_table_and_one_plot_of_a_run_and_its_untrained_network(workdir, tmp_path, capsys):
    out = tmp_path / "bench"
    run(
        workdir,
        "untrained",
        f"--out={out}",
        "--shots=1,8",
        "--costs=0.1,1",
        "--protocols=knn,linear,lowshot,statistics",
    )
    rows = table(out)
    assert rows[""] == [workdir.name, "untrained"]
    assert {f"kNN, k = {k}, top-1" for k in (10, 20, 100, 200)} < set(rows)
    assert {"linear probe, top-1", "low-shot SVM, k = 8, mAP", "low-shot SVM, k = 1, top-1"} < set(rows)
    assert "features: effective rank" in rows and all("±" in cell for cell in rows["low-shot SVM, k = 8, mAP"])
    assert "linear probe, top-1" in capsys.readouterr().out
    trained, untrained = (float(cell.strip("* ")) for cell in rows["linear probe, top-1"])
    assert 50 < untrained <= 100 and trained != untrained
    assert rows["linear probe, top-1"][trained < untrained].startswith("**")
    record = json.loads((out / "bench.json").read_text())
    assert {(r["checkpoint"], r["protocol"]) for r in record.values()} == {
        (label, protocol) for label in rows[""] for protocol in ("knn", "linear", "lowshot", "statistics")
    }
    picture = np.asarray(Image.open(out / "bench.png").convert("RGB")).astype(int)
    for colour in (0x2F6FAB, 0xD1622B):  # both checkpoints are drawn
        rgb = np.array([colour >> 16, colour >> 8 & 255, colour & 255])
        assert (np.abs(picture - rgb).sum(axis=2) < 30).sum() > 200


def test_what_is_done_is_not_done_again(workdir, tmp_path, monkeypatch):
    arguments = (workdir, f"--out={tmp_path}", "--protocols=knn")
    run(*arguments)
    before = (tmp_path / "bench.md").read_text()
    ran: list[list[str]] = []
    true = bench_features._run
    monkeypatch.setattr(bench_features, "_run", lambda c, s, names, o: ran.append(names) or true(c, s, names, o))
    run(*arguments)
    assert not ran and (tmp_path / "bench.md").read_text() == before
    run(*arguments, "--protocols=knn,statistics")
    run(*arguments, "--seed=1")
    run(workdir / "checkpoints" / "10", *arguments[1:])  # a step of a run is not the run
    assert ran == [["statistics"], ["knn"], ["knn"]]


def test_files_directories_and_backbones_alone_give_the_same_features(vit, tmp_path):
    folder, model = vit
    json_file = folder / "vit.json"
    specs = [f"{json_file}={folder / 'whole.safetensors'}", f"{json_file}={folder / 'encoder.safetensors'}"]
    run(*specs, folder / "converted", f"--out={tmp_path}", "--protocols=knn", "--size=8")
    rows = table(tmp_path)
    assert rows[""] == ["vit: whole", "vit: encoder", "converted"]
    for cells in list(rows.values())[1:]:
        assert len({cell.strip("*") for cell in cells}) == 1
    # And they are those of the model:
    found, report = checkpoints.read(checkpoints.resolve(specs[1]))
    assert found.model["head"] is None and report.arrays
    config = recipe(method=found.encoder)
    state = checkpoints.make_state(config, report, make_mesh(config.mesh))
    method = nnx.merge(nnx.split(abstract(found.encoder), nnx.Param, ...)[0], state["params"], state["model_state"])
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    model.eval()
    method.eval()
    np.testing.assert_allclose(method.features(x), model.extract_feat(x, stage="pre_logits"), rtol=1e-5, atol=1e-6)


def test_folders_levels_and_pictures(vit, tmp_path):
    """A folder of class folders, split by the tool; all levels of a ViT; the plot over names of levels."""
    folder, _ = vit
    rng = np.random.default_rng(0)
    for c in range(3):
        (tmp_path / "data" / f"class{c}").mkdir(parents=True)
        for i in range(20):
            pixels = (rng.integers(0, 60, (12, 10, 3)) + 60 * c).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / f"class{c}" / f"{i}.png")
    out = tmp_path / "out"
    arguments = (f"--data={tmp_path / 'data'}", f"--out={out}", "--protocols=levels,lowshot,svm,neighbours")
    run(folder / "converted", "untrained", *arguments, "--shots=1,4", "--costs=1", "--size=8", "--batch_size=16")
    rows = table(out)
    assert {"linear probe, block1, top-1", "linear probe, features, top-1", "SVM, all images, mAP"} < set(rows)
    assert float(rows["linear probe, block1, top-1"][0].strip("*")) > 60
    assert len(list(out.glob("checkpoints/*/pictures/nearest_neighbours.png"))) == 2


@pytest.mark.slow
def test_semi_supervised_grid_and_fine_tuning(workdir, tmp_path):
    arguments = (f"--out={tmp_path}", "--epochs=2", "--rates=0.01,0.1", "--heads=1,10")
    run(workdir, *arguments, "--protocols=semi,finetune", "--batch_size=64")
    rows = table(tmp_path)
    assert {"fine-tuned, top-1", "fine-tuned, 1 % of labels, top-1", "fine-tuned, 10 % of labels, best lr"} < set(rows)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("checkpoints/*/1pct-*/*/result.json")]
    assert len(results) == 4  # the grid
    best = float(rows["fine-tuned, 1 % of labels, top-1"][0])
    assert best == pytest.approx(max(result["top1"] for result in results), abs=0.05)
    assert float(rows["fine-tuned, top-1"][0]) > best  # more labels are better


def test_fine_tuning_follows_the_benchmark():
    data = dict(
        train=dict(dataset=dict(type="Digits"), pipeline=[dict(type="Resize", scale=(8, 8))], device_pipeline=[]),
        val=dict(dataset=dict(type="Digits", split="val"), pipeline=[dict(type="Resize", scale=(8, 8))]),
    )
    plan = Settings(fraction=0.1, seed=2)
    config = grid_config(dict(type="Encoder", model=CLASSIFIER), None, 16, data, plan, 0.1, 100)
    images, devices = len(build(config.data.train.dataset.to_dict())), jax.device_count()
    assert 140 < images < 160 and config.batch_size == images // devices * devices  # of 256
    assert config.max_epochs == 20
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("SGD", 0.1, 0.9, 5e-4)
    (schedule,) = config.param_scheduler
    assert tuple(schedule["milestones"]) == (12, 16) and schedule["gamma"] == 0.2
    params = nnx.to_pure_dict(nnx.state(abstract(config.method.to_dict()), nnx.Param))
    groups = jax.tree_util.tree_leaves_with_path(param_groups(params, config.optim_wrapper.paramwise_cfg.to_dict()))
    scaled = {jax.tree_util.keystr(path, simple=True, separator="/") for path, group in groups if group.lr_mult == 100}
    assert scaled == {"new_head/kernel", "new_head/bias"}  # and not the classifier's own head


# ------------------------------------------------------------------------------------------------ data


def test_data_layouts(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "both" / split / "a").mkdir(parents=True)
    assert labelled_data(str(tmp_path / "both"))["val"]["data_prefix"] == "val"
    voc = labelled_data(str(make_voc(tmp_path / "voc", split="train")))
    assert (voc["train"]["split"], voc["val"]["split"]) == ("train", "val")
    make_voc(tmp_path / "voc", split="test")
    assert labelled_data(str(tmp_path / "voc"))["val"]["split"] == "test"
    for c in "ab":
        (tmp_path / "flat" / c).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (4, 4)).save(tmp_path / "flat" / c / f"{i}.png")
    parts = {name: build(cfg) for name, cfg in labelled_data(str(tmp_path / "flat")).items()}
    assert [np.bincount(labels_of(parts[name])).tolist() for name in ("train", "val")] == [[8, 8], [2, 2]]
    names = [{parts[name].name(i) for i in range(len(parts[name]))} for name in ("train", "val")]
    assert not names[0] & names[1]


def test_voc_is_scored_by_mean_average_precision(vit, tmp_path):
    folder, _ = vit
    names = "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person"
    names = [*names.split(), "pottedplant", "sheep", "sofa", "train", "tvmonitor"]
    rng = np.random.default_rng(0)

    def objects(first):
        return {
            f"{first + i:06d}": [(names[i % 20], 0), (names[int(rng.integers(20))], int(rng.integers(2)))]
            for i in range(60)
        }

    make_voc(tmp_path / "voc", objects(0))
    make_voc(tmp_path / "voc", objects(100), split="test", seed=1)
    arguments = (f"--data={tmp_path / 'voc'}", f"--out={tmp_path / 'out'}", "--size=8", "--shots=1,2", "--costs=1")
    run(folder / "converted", *arguments)
    rows = table(tmp_path / "out")
    assert list(rows)[1:] == ["low-shot SVM, k = 1, mAP", "low-shot SVM, k = 2, mAP", "SVM, all images, mAP"]
    assert all(0 < float(cells[0].split()[0]) < 100 for cells in list(rows.values())[1:])


# ------------------------------------------------------------------------------------------------ the plot, mistakes


def test_the_plot_of_networks_with_other_levels(tmp_path):
    results = {
        "a": {"levels": {"block1_top1": 50.0, "features_top1": 60.0, "best": 2.0}, "semi": {"1pct_top1": 30.0}},
        "b": {"levels": {"stem_top1": 40.0, "stage1_top1": 55.0, "features_top1": 70.0}, "semi": {"10pct_top1": 60.0}},
        "c": {"lowshot": {"k1_map": 20.0, "k1_map_std": 2.0, "k8_map": 50.0, "stem_map": 10.0, "level": 1.0}},
    }
    picture = np.asarray(Image.open(plot_bench(results, tmp_path / "plot.png")).convert("RGB"))
    assert picture.shape[1] > 1000 and (picture.min(axis=2) < 120).sum() > 1000
    plot_bench({"alone": {"linear": {"top1": 50.0}}}, tmp_path / "alone.png")
    plot_bench({"statistics": {"statistics": {"std": 1.0}}}, tmp_path / "none.png")  # nothing to draw is no error


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Which checkpoints"),
        (["untrained"], "Which checkpoints"),
        (["nowhere"], "nowhere is no directory and no model of the zoo"),
        (["weights.pth"], r"which model are these weights of\? .*no file weights.pth.*MODEL=weights.pth"),
        (["configs/mae.py:digits"], "is a recipe: give configs/mae.py:digits=FILE, or configs/mae.py:digits=untrained"),
        (["configs/mae.py:digits=nowhere.pth"], "no weights at .*nowhere.pth"),
        (["configs/mae.py:digits=untrained", "--protocols=kn"], "no 'kn' at all. Did you mean 'knn'"),
        (["configs/mae.py:digits=untrained", "--data=nowhere"], "no such folder"),
        (["configs/mae.py:digits=untrained", "--shots=a"], "--shots=a must be numbers"),
        (["configs/mae.py:digits=untrained", "--epochs=0"], "--epochs=0 is too small"),
        (["configs/mae.py:digits=untrained", "--prtocols=knn"], "Unknown flag --prtocols. Did you mean 'protocols'"),
        (["configs/mae.py:digits=untrained", "--config.seed=1"], "takes no configuration"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_features, "_run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match=message):
        main([*arguments, *([] if any("--out" in a for a in arguments) else [f"--out={tmp_path}"])])


def test_a_recipe_says_how_its_images_are_prepared():
    checkpoint = checkpoints.resolve("configs/mae.py:digits=untrained")
    assert checkpoint.label == "mae:digits, untrained" and checkpoint.path is None
    assert checkpoint.mean == [77.8] * 3
    assert checkpoints.eval_pipeline(checkpoint) == [dict(type="Resize", scale=[32, 32])]
    assert checkpoints.eval_pipeline(checkpoint, 64)[1] == dict(type="CenterCrop", crop_size=64)
