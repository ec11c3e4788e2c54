"""Draws what a model expects at masked places: of pictures the nearest training patches, of text the nearest tokens.

    python draw_cloze.py --config-dir configs/vision/pretraining --config-name demo task.data=DIR \
        common_eval.path=checkpoint_last.pt --output_dir output        # writes output/cloze.png

Of text it needs the vocabulary's spelling, `--encoder-json FILE` of bpe_encode.py.
"""

from __future__ import annotations

import common.requirements

import argparse
from pathlib import Path

import torch

from common import device as devices
from common.errors import UsageError, print_usage_errors
from data2vec.command_line import parse_evaluation
from data2vec.modality import build, forward_of, is_vision, load_checkpoint, open_data

PICTURES = 8


@print_usage_errors
def main(argv: list[str] | None = None) -> Path:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--encoder-json", type=Path)
    spelling, rest = own.parse_known_args(argv)
    options, config, notes, checkpoint = parse_evaluation(rest, __doc__.splitlines()[0])
    print("\n".join(notes))
    output = Path(options.output_dir) / "cloze.png"
    data = open_data(config)
    if is_vision(config):
        draw_pictures(config, data, checkpoint, output)
    elif spelling.encoder_json is None or not spelling.encoder_json.is_file():
        raise UsageError(f"--encoder-json {spelling.encoder_json}: give the file that bpe_encode.py used or wrote")
    else:
        draw_text(config, data, checkpoint, output, spelling.encoder_json)
    print(f"drawn: {output}")
    return output


def load_model(config, data, checkpoint: dict | None) -> torch.nn.Module:
    """The untrained model of the run's seed, with the checkpoint's weights where given."""
    devices.seed_everything(config.common.seed)
    model = build(config, data)
    if checkpoint:
        load_checkpoint(model, checkpoint, config.common_eval.path, config, data)
    return model.eval()


def draw_pictures(config, data, checkpoint: dict, output: Path) -> None:
    """Held-out pictures, evenly from the sorted list, filled by the untrained model and by the trained one."""
    from data2vec.cloze_figure import PatchPool, draw, fill_masked  # torchvision: text does without
    from data2vec.data.image_data import Normalize

    normalize = Normalize(config, torch.device("cpu"))
    samples, _ = data.split(config.dataset.valid_subset, training=False)
    apart = torch.linspace(0, len(samples) - 1, min(PICTURES, len(samples))).long()
    batch = samples.collate(apart.numpy(), epoch=1)
    training, _ = data.split(config.dataset.train_subset, training=True)
    forward, filled = forward_of(config, data, torch.device("cpu")), []
    for weights in (None, checkpoint):
        model = load_model(config, data, weights)
        images, mask, pictures = fill_masked(forward, model, batch, PatchPool(model, training, normalize))
        filled.append(pictures)
    draw(images, mask, filled, output)


def draw_text(config, data, checkpoint: dict, output: Path, encoder_json: Path) -> None:
    """The first whole blocks of the validation split, and the commonest words' neighbours."""
    from data2vec.token_figure import Expectations, draw, filled_blocks, spellings

    model = load_model(config, data, checkpoint)
    known, spelled = Expectations(model, data), spellings(data, encoder_json)
    draw(filled_blocks(model, data, known, spelled), known.alike(spelled), output)


if __name__ == "__main__":
    main()
