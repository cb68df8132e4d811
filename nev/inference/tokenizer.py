"""A text tower's tokenizer without transformers: it cuts at the longest text, and knows its padding."""

from __future__ import annotations

from tokenizers import Tokenizer

from nev.models.text import TextTower


def make_tokenizer(tower: TextTower) -> Tokenizer:
    """The tower's tokenizer, which cuts at the longest text and pads to the longest of a batch by itself."""
    source = tower.tokenizer
    tokenizer: Tokenizer = Tokenizer.from_str(source.backend_tokenizer.to_str())
    tokenizer.enable_truncation(tower.longest, direction=source.truncation_side)
    tokenizer.enable_padding(
        direction=source.padding_side,
        pad_id=source.pad_token_id,
        pad_token=source.pad_token,
        pad_type_id=source.pad_token_type_id,
    )
    return tokenizer
