"""The published weights of BEiT v2, under the names of their files, as the reference lists them.

From PRETRAINING.md, TOKENIZER.md and get_started_for_image_classification.md of microsoft/unilm, beit2.
"""

from __future__ import annotations

RELEASE = "https://github.com/addf400/files/releases/download/BEiT-v2/"
# where they were before; the container answers signed requests only
CONTAINER = "https://conversationhub.blob.core.windows.net/beit-share-public/beitv2/"

# name -> file; both are accepted by --tokenizer_weight
TOKENIZERS = {
    "vqkd_encoder_base_decoder_1x768x12_clip": "vqkd_encoder_base_decoder_1x768x12_clip-d93179da.pth",
    "vqkd_encoder_base_decoder_3x768x12_clip": "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth",
    "vqkd_encoder_base_decoder_1x768x12_dino": "vqkd_encoder_base_decoder_1x768x12_dino-663c55d7.pth",
}
# accepted by --finetune, --pretrained_weights and --resume of an evaluation
MODELS = tuple(
    f"beitv2_{size}_patch16_224_{training}"
    for size in ("base", "large")
    for training in ("pt1k_300e", "pt1k", "pt1k_ft21k", "pt1k_300e_ft1k", "pt1k_ft1k", "pt1k_ft21kto1k")
)


def addresses(name: str) -> tuple[str, ...]:
    """Where a published file is, the first that should be tried first; nothing for a name that nobody publishes."""
    file = TOKENIZERS.get(name) or (f"{name}.pth" if name in MODELS else name)
    if file not in TOKENIZERS.values() and file.removesuffix(".pth") not in MODELS:
        return ()
    return RELEASE + file, CONTAINER + file
