"""What configs and scripts train with by default: learning rates, decays, warm-ups, batches, lengths.

    python -m ci.recipes            # what differs from ci/baselines/recipes.json, and where the pages say it
    python -m ci.recipes --write    # stores them, in the commit that changes the pages

The demos' recipes are not among them: `make outcomes` holds those to what they promise.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "ci" / "baselines" / "recipes.json"
# kind of setting -> its names, and the words that a page has for it
KINDS = {
    r"(?:base_|min_)?lr|learning_rate": r"rate|\blr\b|学习率",
    r"weight_decay(?:_end)?|layer_decay|(?:model_)?ema_(?:end_)?decay": r"decay|average|衰减|EMA",
    r"warmup_\w+": r"warm|预热",
    r"(?:per_device_train_)?batch_size|max_tokens|tokens_per_sample|update_freq|accumulate": r"batch|token|批",
    r"(?:num_train_|train_)?epochs|max_epoch|max_update|max_steps": r"epoch|update|step|轮|步",
    r"clip_grad|clip_norm|drop_path|mixup|cutmix|label_smoothing": r"clip|drop|mix|裁剪|平滑",
    r"mask_prob|num_mask_patches": r"mask|掩码",
}
_NAME = "|".join(KINDS)
_NUMBER = r"[\[(]?-?\d[\d.]*(?:[eE]-?\d+)?[\])]?"
_SETTING = {
    ".yaml": re.compile(rf"^ *({_NAME}): *({_NUMBER})", re.M),
    ".sh": re.compile(rf"(?:--|\b)({_NAME})[= ]\"?(?:\$\{{[^}}]*:-)*({_NUMBER})"),
    ".py": re.compile(rf"(?:^ +({_NAME}): [\w |]+ = |\"--({_NAME})\",.*default=|\b({_NAME})=)({_NUMBER})", re.M),
}


def files(root: Path = ROOT) -> list[Path]:
    """Configurations, launch scripts and tables of options, but of the demos."""
    patterns = ("configs/**/*.yaml", "*.sh", "scripts/*.sh", "test/*.sh", "*/*options.py", "*/options/*.py")
    found = {path for pattern in patterns for path in root.glob(f"*_for_PyTorch/{pattern}")}
    found |= set(root.glob("*_for_PyTorch/*/config/*.py"))
    return sorted(path for path in found if "demo" not in path.name)


def read(path: Path) -> dict[str, list[float]]:
    """Every setting of a file that is a number, in the order of its lines."""
    settings: dict[str, list[float]] = {}
    for match in _SETTING[path.suffix].finditer(path.read_text(encoding="utf-8")):
        *names, value = match.groups()
        name = next(name for name in names if name)
        settings.setdefault(name, []).append(float(value.strip("[]().")))
    return settings


def current(root: Path = ROOT) -> dict[str, dict[str, list[float]]]:
    found = {str(path.relative_to(root)): read(path) for path in files(root)}
    return {name: settings for name, settings in found.items() if settings}


def lines_that_say(project: Path, name: str, values: list[float]) -> list[str]:
    """Places of a project's pages that have one of the values beside a word for the setting."""
    word = re.compile(next(words for names, words in KINDS.items() if re.fullmatch(names, name)), re.IGNORECASE)
    places = []
    for page in ("README.md", "README.zh-CN.md", "UPSTREAM.md"):
        for number, line in enumerate((project / page).read_text(encoding="utf-8").splitlines(), 1):
            said = {float(text) for text in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])", line)}
            if word.search(line) and said & set(values):
                places.append(f"{project.name}/{page}:{number}")
    return places


def differences(stored: dict, now: dict, root: Path = ROOT) -> list[str]:
    """A line for each setting that is not as stored."""
    lines = []
    for file in sorted(stored.keys() | now.keys()):
        old, new = stored.get(file, {}), now.get(file, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                project = root / file.split("/")[0]
                places = lines_that_say(project, name, old.get(name, [])) or [f"{project.name}/README.md"]
                change = f"change {', '.join(places)}, and say in {project.name}/UPSTREAM.md why"
                lines.append(f"{file}: {name} was {old.get(name)}, is {new.get(name)}: {change}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store what the code has now")
    if parser.parse_args().write:
        lines = [f"{json.dumps(file)}: {json.dumps(settings)}" for file, settings in current().items()]
        STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return 0
    found = differences(json.loads(STORED.read_text(encoding="utf-8")), current())
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
