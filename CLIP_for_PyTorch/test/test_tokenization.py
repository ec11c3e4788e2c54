"""Both tokenizers exact; packing and late padding lose nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import RobertaTokenizer

from clip_pretraining.data import tokenization
from clip_pretraining.model import construction

GOLDEN = Path(__file__).parent / "golden"
OPENAI = json.loads((GOLDEN / "clip_bpe.json").read_text())
ROBERTA = json.loads((GOLDEN / "roberta_bpe.json").read_text())
TINY = GOLDEN / "tiny_roberta_tokenizer"


@pytest.fixture(scope="module")
def roberta() -> RobertaTokenizer:
    return RobertaTokenizer(vocab=str(TINY / "vocab.json"), merges=str(TINY / "merges.txt"))


def test_openai_tokenizer_is_exact():
    tokenizer = tokenization.openai_tokenizer()
    cleaned = [tokenization.clean_caption(text) for text in OPENAI["strings"]]
    got = tokenizer(cleaned, truncation=True, max_length=77, split_special_tokens=True)["input_ids"]
    assert [ids + [0] * (77 - len(ids)) for ids in got] == OPENAI["ids"]
    assert [tokenizer.decode(ids).strip() for ids in OPENAI["raw_bpe"]] == [text.strip() for text in OPENAI["decode"]]


def test_roberta_tokenizer_is_exact(roberta):
    padded = roberta(ROBERTA["strings"], padding="max_length", max_length=ROBERTA["max_length"], truncation=True)
    assert padded["input_ids"] == ROBERTA["input_ids"] and padded["attention_mask"] == ROBERTA["attention_mask"]


def test_packed_captions_are_the_unpadded_ids(roberta):
    packed = tokenization.PackedCaptions.tokenise(ROBERTA["strings"], roberta, max_length=128)
    assert [packed[i].tolist() for i in range(len(packed))] == ROBERTA["unpadded_128"]


@pytest.mark.parametrize(
    "lengths, width", [([3, 8], 8), ([3, 9], 16), ([1], 8), ([40, 5], 48), ([100], 128), ([129], 192)]
)
def test_a_batch_is_padded_to_the_next_bucket(lengths, width):
    rows = [np.arange(5, 5 + n, dtype=np.int32) for n in lengths]
    batch = tokenization.pad_captions(rows, pad_token_id=1, max_length=512)
    assert batch["input_ids"].shape == (len(rows), width)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"][0, : lengths[0]].tolist() == rows[0].tolist()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 1).all()


def test_padding_never_exceeds_what_the_model_has_positions_for():
    assert tokenization.pad_captions([np.ones(70, np.int32)], 0, max_length=72)["input_ids"].shape == (1, 72)


def test_a_trained_tokenizer_reads_back_its_captions(tmp_path):
    captions = ["grinning face", "red heart", "grinning cat", "black heart"] * 3
    tokenizer = tokenization.train_tokenizer(captions, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    again = tokenization.load_tokenizer(str(tmp_path))
    assert again("grinning heart")["input_ids"] == tokenizer("grinning heart")["input_ids"]
    assert again.decode(again("grinning heart")["input_ids"], skip_special_tokens=True) == "grinning heart"
    assert [again.bos_token_id, again.pad_token_id, again.eos_token_id] == [0, 1, 2]


@pytest.mark.parametrize("family", ["clip", "dual"])
def test_a_new_model_s_feature_is_of_the_whole_caption(family):
    """A CLIPModel whose end has the id 2 would stop reading at the word with the highest id."""
    captions = ["grinning face", "red heart", "grinning cat", "black heart"] * 3
    model, tokenizer, _ = construction.from_scratch("tiny", family, captions)
    first, *others = sorted(["face", "heart", "cat"], key=lambda word: -max(tokenizer(f" {word}")["input_ids"]))
    rows = tokenizer([f"red {first} {other}" for other in others], return_tensors="pt", padding=True)
    features = model.eval().get_text_features(**rows).pooler_output
    assert (features[0] - features[1]).abs().max() > 1e-4
    assert tokenizer.eos_token_id == {"clip": 3, "dual": 2}[family] == model.config.text_config.eos_token_id
