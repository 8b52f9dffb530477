"""Tokenizers of every family, made in a moment: how each splits text, and what it puts around it."""

from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tiny import TEXT, tiny_tokenizer


def bert_like(*, mask: str | None = "[MASK]") -> PreTrainedTokenizerFast:
    """WordPiece in lower case without accents; [CLS] a [SEP] b [SEP] with token types."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, model_input_names=inputs)
    if mask is not None:
        tokenizer.add_special_tokens({"mask_token": mask})
    return tokenizer


def roberta_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE; <s> a </s></s> b </s> without token types, as BART too."""
    tokenizer = tiny_tokenizer(None, bos="<s>", eos="</s>")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})
    return tokenizer


def t5_like() -> PreTrainedTokenizerFast:
    """Unigram pieces with "▁" for spaces; a </s>."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_unigram()), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@lru_cache
def _unigram() -> str:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend.to_str()


CAUSAL: dict[str, Any] = {
    "byte level": lambda: tiny_tokenizer(None),
    "byte level with BOS": lambda: tiny_tokenizer(None, eos="</s>", adds_bos=True),
    "byte level without EOS": lambda: tiny_tokenizer(None, eos=None),
    "pieces with BOS": lambda: tiny_tokenizer(None, eos="</s>", adds_bos=True, metaspace=True),
}
MASKED: dict[str, Any] = {"bert": bert_like, "roberta": roberta_like}
