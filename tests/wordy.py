"""A tiny random model and a tokenizer of words, saved as a user's would be."""

from __future__ import annotations

from pathlib import Path

from families import tiny

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %} answer"
# What tokenizes the texts of the tasks: letters, digits and punctuation, one token each.
LETTERS = [chr(code) for code in range(32, 127)]


def save_model(folder: Path, **options: object) -> Path:
    """A Llama of two layers and a tokenizer of one token for each ASCII character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[END]", *LETTERS]
    characters = Tokenizer(models.WordLevel(dict(zip(words, range(97), strict=True)), "[UNK]"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="[UNK]", eos_token="[END]", pad_token="[END]"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    model = tiny("llama", max_position_embeddings=4096, vocab_size=97, **options)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    return folder
