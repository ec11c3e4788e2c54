"""From options to model, tokenizer, pairs and batches: everything the Trainer is given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers import VisionTextDualEncoderProcessor as DualEncoderProcessor
from transformers.utils import logging as hf_logging

from clip_pretraining.data.batches import GlobalBatchSampler
from clip_pretraining.data.crop_cache import CropCache
from clip_pretraining.data.pairs import Collate, DecodedImages, ImageSource, PairDataset, Pairs
from clip_pretraining.data.picture_check import check_images, tell_unreadable
from clip_pretraining.data.random_crop import RandomCrops
from clip_pretraining.data.tokenization import load_tokenizer
from clip_pretraining.evaluation import zeroshot
from clip_pretraining.evaluation.encoder import Encoder, evaluate_split
from clip_pretraining.exchange.transformers_folder import processor_of
from clip_pretraining.model import layers, loading, lora, patch_dropout
from clip_pretraining.model.loading import ImageSettings
from clip_pretraining.options.arguments import ClipTrainingArguments, DataArguments, ModelArguments
from clip_pretraining.training import sources
from common import device as devices
from common.distributed import World
from common.errors import UsageError


@dataclass
class Setup:
    """All parts of a run. `validation_features` is filled by `evaluate`, for the picture of queries and answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: ImageSettings
    processor: CLIPProcessor | DualEncoderProcessor
    collate: Collate
    train: PairDataset | None = None
    train_identity: dict[str, int | str] = field(default_factory=dict)  # of the pairs, by content
    validation: PairDataset | None = None
    zero_shot: zeroshot.Task | None = None
    validation_features: tuple[torch.Tensor, torch.Tensor] | None = None


def build(model_args: ModelArguments, data: DataArguments, args: ClipTrainingArguments, world: World) -> Setup:
    """Loads the model, the tokenizer and the splits that are needed.

    Raises:
        UsageError: anything missing or wrong, before training.
    """
    hf_logging.disable_progress_bar()
    hub = model_args.hub()
    model = loading.load_model(model_args.model_name_or_path, model_args.config_name, args.loss == "siglip", **hub)
    layers.install(model)
    loading.freeze(model, model_args.freeze_vision_model, model_args.freeze_text_model)
    if args.do_train:
        _change_for_training(model, model_args, args)
    source = model_args.model_name_or_path or model_args.config_name
    tokenizer = _tokenizer(model_args.tokenizer_name or source, model, hub)
    settings = loading.image_settings(model_args.image_processor_name or source, model.config, **hub)
    longest = min(data.max_seq_length, loading.max_caption_tokens(model.config))

    setup = Setup(
        model,
        tokenizer,
        settings,
        processor_of(model, tokenizer, settings),
        Collate(tokenizer.pad_token_id, longest, args.mask_equal_captions),
    )

    def split_of(name: str) -> sources.Split:
        source = sources.find(name, data, model_args.cache_dir)
        return sources.prepare(source, data, tokenizer, longest, args.dataloader_num_workers, world)

    if args.do_train:
        train = split_of("train")
        setup.train, setup.train_identity = _dataset(train, setup, data, args.seed), train.identity()
        _check_size(setup.train, args, world)
    if args.do_eval:
        setup.validation = _dataset(split_of("val"), setup, data)
        if args.zero_shot_dir:
            setup.zero_shot = _zero_shot(model_args, data, args, world)
    return setup


def _change_for_training(model: PreTrainedModel, model_args: ModelArguments, args: ClipTrainingArguments) -> None:
    if args.keep_patches < 1 and model_args.freeze_vision_model:
        raise UsageError("--keep_patches makes training of the vision tower cheaper, and it is frozen: leave one out")
    patch_dropout.keep_patches(model, args.keep_patches)
    if args.lora_rank:
        lora.add(model, args.lora_rank, args.lora_scale * args.lora_rank)


def _tokenizer(source: str, model: PreTrainedModel, hub: dict) -> PreTrainedTokenizerBase:
    try:
        tokenizer = load_tokenizer(source, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{source}: no tokenizer that can be read ({loading.first_line(error)}); give --tokenizer_name"
        ) from None
    words = model.config.text_config.vocab_size
    if len(tokenizer) > words:
        raise UsageError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the model's text tower only {words}")
    return tokenizer


def _zero_shot(
    model_args: ModelArguments, data: DataArguments, args: ClipTrainingArguments, world: World
) -> zeroshot.Task:
    """Read before training: what is wrong with it must not show after the last epoch."""
    task = zeroshot.read_task(args.zero_shot_dir, args.class_names, args.templates, data.clean_captions)
    pictures = Pairs("zero_shot", task.images, [str(label) for label in task.labels], np.arange(len(task.images)))
    cache = Path(model_args.cache_dir or Path(args.zero_shot_dir) / ".clip_cache")
    if data.check_images:
        bad, _ = check_images(pictures, args.dataloader_num_workers, cache)
        tell_unreadable(pictures, bad, data.max_bad_share, cache / "left_out_zero_shot.tsv")
        pictures = pictures.without_images(sorted(bad))
    return replace(task, images=pictures.images, labels=[int(label) for label in pictures.captions])


def _dataset(split: sources.Split, setup: Setup, data: DataArguments, crop_seed: int | None = None) -> PairDataset:
    images: ImageSource = DecodedImages(split.pairs.images, setup.settings.size)
    if data.random_crop < 1 and crop_seed is not None:
        images = RandomCrops(images, data.random_crop, crop_seed)
    elif data.crop_cache:
        images = CropCache(Path(data.crop_cache), split.pairs.name, images)
    return PairDataset(split.pairs, split.tokens, images)


def _check_size(train: PairDataset, args: ClipTrainingArguments, world: World) -> None:
    sizes = train.pairs.source_sizes()
    if args.source_weights and any(w and not size for w, size in zip(args.source_weights, sizes, strict=True)):
        raise UsageError(f"--source_weights: a part without pairs (they have {sizes}) cannot be drawn: give it 0")
    needed = args.per_device_train_batch_size * world.size if args.dataloader_drop_last else world.size
    if len(train) < needed:
        raise UsageError(
            f"{len(train)} training pairs do not fill a global batch of {needed}: lower --per_device_train_batch_size "
            "or leave out --dataloader_drop_last"
        )


def _steps_per_epoch(setup: Setup, args: ClipTrainingArguments, world: World) -> int:
    batch = args.per_device_train_batch_size
    return len(GlobalBatchSampler(len(setup.train), batch, 0, world.rank, world.size, args.dataloader_drop_last))


def total_steps(setup: Setup, args: ClipTrainingArguments, world: World) -> int:
    """Optimizer steps of the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * _steps_per_epoch(setup, args, world))


def start_line(setup: Setup, args: ClipTrainingArguments, world: World) -> str:
    """What is about to run, in one line: model, data, batch, precision, devices."""
    model = setup.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = "" if trained == total else f", {trained / 1e6:.1f} M of them trained"
    parts = [f"{model.config.model_type}, {total / 1e6:.1f} M parameters{share}"]
    for name, split in (("train", setup.train), ("validation", setup.validation)):
        if split is not None:
            parts.append(f"{name}: {len(split):,} captions of {len(split.images):,} pictures")
    if args.do_train:
        chunks = args.per_device_train_batch_size // args.micro_batch_size
        batch = f"{args.micro_batch_size} x {world.size} ranks x {chunks} chunks"
        parts.append(f"{args.loss} loss over {args.per_device_train_batch_size * world.size} pairs ({batch})")
        parts += _special(args)
    return "starting: " + "; ".join([*parts, f"{args.precision} on {world.size} x {devices.describe(world.device)}"])


def _special(args: ClipTrainingArguments) -> list[str]:
    """What of the training is not as usual."""
    said = {
        f"LoRA of rank {args.lora_rank}": args.lora_rank,
        f"{args.keep_patches:.0%} of the patches": args.keep_patches < 1,
        f"evaluated and saved is the average of the weights ({args.ema_decay:g})": args.ema_decay,
        "sharded over the ranks": args.sharded,
        "compiled": args.torch_compile,
    }
    return [text for text, given in said.items() if given]


def evaluate(setup: Setup, args: ClipTrainingArguments, world: World) -> dict[str, float]:
    """Metrics of the validation split, and of zero-shot classification when a folder was given."""
    encoder = Encoder(
        setup.model,
        setup.settings,
        setup.collate.pad_token_id,
        setup.collate.max_length,
        world,
        args.precision,
        args.per_device_eval_batch_size,
        args.dataloader_num_workers,
    )
    split = setup.validation
    metrics, *features = evaluate_split(
        encoder, split.pairs, split.tokens, split.images, args.per_device_eval_batch_size, args.dataloader_drop_last
    )
    setup.validation_features = tuple(features)
    if setup.zero_shot:
        metrics |= zeroshot.evaluate(encoder, setup.tokenizer, setup.zero_shot)
    return metrics
