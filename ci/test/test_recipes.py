"""A changed default recipe is noticed, in every kind of file, and the pages that tell the old one are named."""

import copy
import json
import re
import shutil

import pytest

from ci import recipes

STORED = json.loads(recipes.STORED.read_text(encoding="utf-8"))


def test_recipes_are_as_the_pages_say():
    found = recipes.differences(STORED, recipes.current())
    assert not found, "\n".join([*found, "then, in the same commit: python -m ci.recipes --write"])


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("ViT_for_PyTorch/configs/run_vit_base_p16_224_100ep.yaml", "base_lr: 5.0e-4", "base_lr: 6.0e-4"),
        ("ViT_for_PyTorch/vit/config/run_config.py", "weight_decay: float = 0.05", "weight_decay: float = 0.1"),
        ("Beit2_for_PyTorch/test/train_full_1p.sh", "lr 1.5e-3", "lr 2e-3"),
        ("Beit2_for_PyTorch/beit2/pretraining_options.py", 'epochs", type=int, default=300', 'epochs", default=200'),
        ("CLIP_for_PyTorch/test/clip_options.sh", "warmup_steps 0", "warmup_steps 100"),
        ("Data2vec_for_PyTorch/configs/text/pretraining/base.yaml", "lr: [0.0002]", "lr: [0.0005]"),
        ("Data2vec_for_PyTorch/configs/text/pretraining/base.yaml", "max_tokens: 8192", "max_tokens: 4096"),
    ],
)
def test_a_changed_default_is_a_difference(file, old, new, tmp_path):
    changed = tmp_path / recipes.ROOT.joinpath(file).name
    shutil.copy(recipes.ROOT / file, changed)
    text = changed.read_text(encoding="utf-8")
    assert old in text
    changed.write_text(text.replace(old, new), encoding="utf-8")
    (line,) = recipes.differences(STORED, recipes.current() | {file: recipes.read(changed)})
    setting = re.match(r"\w+", old)[0]
    assert line.startswith(f"{file}: {setting} was {STORED[file][setting]}, is ") and "README.md" in line


def test_the_lines_of_the_pages_are_named():
    changed = copy.deepcopy(STORED)
    changed["ViT_for_PyTorch/configs/run_vit_base_p16_224_100ep.yaml"]["base_lr"] = [6e-4]
    (line,) = recipes.differences(STORED, changed)
    readme = (recipes.ROOT / "ViT_for_PyTorch" / "README.md").read_text(encoding="utf-8").splitlines()
    number = next(number for number, text in enumerate(readme, 1) if "peak rate 5e-4 x global batch / 256" in text)
    assert f"ViT_for_PyTorch/README.md:{number}," in line and "ViT_for_PyTorch/UPSTREAM.md why" in line
