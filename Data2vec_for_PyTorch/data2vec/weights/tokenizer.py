"""The tokenizer of a Hugging Face folder: GPT-2's byte-level BPE with the ids of dict.txt."""

from __future__ import annotations

from pathlib import Path

from data2vec.data.dictionary import MASK, Dictionary


def export_tokenizer(
    folder: str | Path, encoder_json: str | Path, vocab_bpe: str | Path, vocab: Dictionary, max_length: int
) -> int:
    """Writes what `AutoTokenizer` reads; a line becomes the ids that bpe_encode.py and preprocess.py give it, with <s>.

    BPE goes through pieces that dict.txt may not list, so these need ids of their own, above all others, where training
    has <unk>. The model's table gets a copy of <unk>'s row for each, which makes the outputs equal.

    Returns:
        Number of ids, `len(vocab)` where every piece is listed.

    Raises:
        ValueError: the two files are not GPT-2's, or dict.txt lists none of their pieces.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    try:
        pieces, merges = models.BPE.read_file(str(encoder_json), str(vocab_bpe))
    except Exception as error:  # the library has no class of its own
        raise ValueError(f"{encoder_json} and {vocab_bpe} are not GPT-2's two files ({error})") from None
    ids = {symbol: vocab.index(symbol) for symbol in (*vocab.symbols[: vocab.nspecial], MASK)}
    count = len(vocab)
    for piece, number in sorted(pieces.items(), key=lambda item: item[1]):
        if piece in ids:
            continue
        if str(number) in vocab:
            ids[piece] = vocab.index(str(number))
        else:
            ids[piece], count = count, count + 1
    if count == len(vocab) + len(pieces):
        raise ValueError(f"dict.txt lists none of the numbers in {encoder_json}: they belong to different corpora")
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", vocab.eos_index), ("<s>", vocab.bos_index), trim_offsets=False, add_prefix_space=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=MASK,
    ).save_pretrained(folder)
    return count
