"""Tiny models and texts for the fine-tuning tests."""

from __future__ import annotations

import random
from pathlib import Path

import torch

SMALL = ["--seq", "16", "--tokens", "64", "--steps", "6", "--threads", "1", "--evaluate", "3"]


def tiny_llama(layers: int = 4, **more):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **more,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def tiny_bert(layers: int = 4, dropout: float = 0.0):
    import transformers

    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def byte_tokenizer():
    """One token a byte, and an end token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def folder_of(path: Path, layers: int = 4) -> Path:
    """A transformers folder with a tiny model and its tokenizer."""
    tiny_llama(layers).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def text_file(path: Path, words: int = 1500) -> Path:
    """Repetitive text with a blank line now and then."""
    generator = random.Random(1)
    names = ["stone", "river", "bridge", "wheel", "lamp", "the", "a", "turns", "holds", "under"]
    parts = [generator.choice(names) + ("\n\n" if i % 40 == 39 else " ") for i in range(words)]
    path.write_text("".join(parts), encoding="utf-8")
    return path
