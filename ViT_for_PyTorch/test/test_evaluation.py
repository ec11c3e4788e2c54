"""Evaluation as users run it: classes by name, a line a class, k-NN and linear on any backbone and number of ranks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

import run_vit
import vit
from common.distributed import World
from common.errors import UsageError
from common.run import result_file
from vit.config.run_config import KnnConfig
from vit.data import class_identity
from vit.data.image_folder import scan
from vit.training import probes
from vit.training.class_report import ClassTally
from vit.training.metrics import topk_counts

PROJECT = Path(__file__).resolve().parents[1]
COLOURS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Noisy red, green and blue: 8 each to train, 4, 3 and 3 to evaluate."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count + (split == "val" and name == "ant")):
                noise = generator.normal(0, 60, (24, 24, 3))
                Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Four classes by name, in another order than the folders'; pictures normalised otherwise than ImageNet's."""
    torch.manual_seed(0)
    model = vit.create_model("vit_demo", 4, img_size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    torch.nn.init.normal_(model.head.weight)
    return vit.save_pretrained(model, tmp_path_factory.mktemp("model") / "m", ["cat", "dog", "ant", "bee"])


def words(pictures: Path, model: Path, output: Path, *more: str) -> list[str]:
    folders = ["--train_dataset_dir", f"{pictures}/train", "--eval_dataset_dir", f"{pictures}/val"]
    common = ["--device", "cpu", "--num_workers", "0", "--batch_size", "4", "--output_dir", str(output)]
    return [*folders, *common, "--load_checkpoint", str(model), *more]


def score(*arguments) -> tuple[dict[str, str], Path]:
    run_vit.main(words(*arguments))
    return result_file.read(next(arguments[2].glob("*.log"))), arguments[2]


def test_classes_by_name_and_the_table_and_matrix_agree_with_prediction(pictures, model, tmp_path, capsys):
    result, output = score(pictures, model, tmp_path, "--run_mode", "eval")
    printed = capsys.readouterr().out
    assert "classes matched by name: 3 of the model's 4" in printed and "most often taken for" in printed
    content = json.loads((output / "evaluation.json").read_text())
    found = {path: vit.pipeline(model=model, device="cpu")(path)[0] for path in scan(pictures / "val").paths}
    names = ["cat", "dog", "ant", "bee"]
    expected = np.zeros((4, 4), int)
    for path, labels in found.items():
        expected[names.index(Path(path).parent.name), names.index(labels[0]["label"])] += 1
    assert content["confusion"] == expected.tolist()
    assert [row["pictures"] for row in content["classes"]] == [3, 4, 3]
    hits = np.diag(expected)
    assert int(result["Top1"]) == hits.sum() and int(result["Count"]) == 10
    mean = np.mean([hits[i] / expected[i].sum() for i in (0, 2, 3)]) * 100
    assert float(result["MeanClassAccuracy"]) == pytest.approx(mean, abs=1e-3)
    with Image.open(output / "confusion.png") as image:
        assert min(image.size) > 200


def test_a_folder_that_is_no_class_of_the_model_is_named(pictures, model, tmp_path):
    (tmp_path / "val").mkdir()
    for name, now in (("ant", "ant"), ("bee", "wasp")):
        (tmp_path / "val" / now).symlink_to(pictures / "val" / name)
    with pytest.raises(
        UsageError, match=r"classes that .* was trained on: wasp \(1 of 2\) must be among cat, dog, ant"
    ):
        score(tmp_path, model, tmp_path / "out", "--run_mode", "eval")
    assert not (tmp_path / "out").exists()


def test_published_weights_know_imagenet_by_its_ids_and_names(pictures):
    info, folder = ImageNetInfo("imagenet-1k"), scan(pictures / "val")
    ids = replace(folder, classes=[info.index_to_label_name(i) for i in (7, 3, 999)])
    assert class_identity.match(ids, 1000, None, "w.pth").of_folder == [7, 3, 999]
    described = [info.index_to_description(i) for i in range(1000)]
    assert class_identity.match(ids, 1000, described, "hf").of_folder == [7, 3, 999]
    daisy = replace(folder, classes=["daisy", "bee", "vase"])
    assert class_identity.match(daisy, 1000, None, "vit_base_p16", True).of_folder == [985, 309, 883]
    with pytest.raises(UsageError, match=r"crane \(1 of 3\)"):  # a bird and a machine
        class_identity.match(replace(folder, classes=["ant", "bee", "crane"]), 1000, None, "vit_base_p16", True)
    with pytest.raises(UsageError, match="4 classes without names, .* has 3 class folders: the classes cannot be told"):
        class_identity.match(folder, 4, None, "w.pth")
    assert "sorted order" in class_identity.match(folder, 3, None, "w.pth").note


def test_ties_count_against_the_picture_in_the_matrix_too():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (200, 7), generator=generator).float()
    target = torch.randint(0, 7, (200,), generator=generator)
    tally = ClassTally.of(7, torch.device("cpu"))
    tally.add(logits, target)
    counts = topk_counts(logits, target)
    assert tally.confusion.trace() == counts["top1"] and tally.top5.sum() == counts["top5"]
    assert tally.confusion.sum(1).tolist() == torch.bincount(target, minlength=7).tolist()


def test_features_are_scored_alike_on_any_number_of_ranks(pictures, model, tmp_path):
    """Colours are told by the features of random weights; two ranks give the same scores as one, twice in a process."""
    runs = {method: ("--run_mode", method, "knn.neighbours=5") for method in ("knn", "linear")}
    calls = [words(pictures, model, tmp_path / "two" / method, *more) for method, more in runs.items()]
    script = tmp_path / "both.py"
    script.write_text(f"import sys\nsys.path[:0] = {[str(PROJECT), str(PROJECT.parent)]}\nimport run_vit\n")
    with script.open("a") as file:
        file.writelines(f"run_vit.main({call})\n" for call in calls)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for method, more in runs.items():
        one, output = score(pictures, model, tmp_path / "one" / method, *more)
        assert int(one["Top1"]) >= 9 and one["Count"] == "10"
        assert (output / f"{method}.json").is_file() and (output / f"{method}_confusion.png").is_file()
        two = result_file.read(next((tmp_path / "two" / method).glob("*.log")))
        assert all(one[key] == two[key] for key in ("Top1", "Top5", "Count", "MeanClassAccuracy"))


def test_votes_are_those_of_dinos_rule():
    own = probes.Features(torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]]), torch.tensor([0, 1, 1]))
    asked = probes.Features(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
    options = KnnConfig(neighbours=2, temperature=0.5)
    votes, _ = probes.nearest_neighbours(own, asked, 3, options, World())
    cosines = torch.tensor([3 / 10**0.5, 4 / 20**0.5])
    torch.testing.assert_close(votes, torch.tensor([[*(cosines / 0.5).exp().tolist(), 0.0]]))


def test_an_encoder_without_a_head_has_features_too_and_positions_are_said(pictures, model, tmp_path, capsys):
    state = vit.weights.read_state_dict(model)
    bare = {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}
    torch.save({"model": bare | {"norm.weight": torch.ones(96), "norm.bias": torch.zeros(96)}}, tmp_path / "mae.pth")
    options = ("--run_mode", "knn", "model.name=vit_demo", "model.img_size=32", "model.global_pool=token")
    result, _ = score(pictures, tmp_path / "mae.pth", tmp_path / "out", *options)
    assert result["Count"] == "10" and "ActualLoss" not in result
    printed = capsys.readouterr()
    assert "global_pool=token" in printed.out and "positions of 2 x 2 patches are interpolated to 4 x 4" in printed.err
    with pytest.raises(UsageError, match="mae.pth: has no classifier to evaluate: .* --run_mode knn"):
        score(pictures, tmp_path / "mae.pth", tmp_path / "out", "--run_mode", "eval", "model.name=vit_demo")
