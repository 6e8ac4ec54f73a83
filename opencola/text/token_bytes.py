"""What each token of a vocabulary stands for, in bytes of UTF-8."""

import json
from collections.abc import Callable

import tokenizers
from tokenizers import pre_tokenizers

from opencola.errors import UserError

# Steps of decoders that read each token by itself, but for the first of a text.
APART = {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}

# The byte-level alphabet writes each byte as one character: itself where it can be printed, else one behind U+00FF.
_CODES = sorted(map(ord, pre_tokenizers.ByteLevel.alphabet()))
_VALUES = [*(code for code in _CODES if code < 256), *sorted({*range(256)} - {*_CODES})]
_BYTES = {chr(code): value for code, value in zip(_CODES, _VALUES, strict=True)}


def decoder_steps(backend: tokenizers.Tokenizer) -> list[str]:
    """The kinds of the decoder's steps. Of ByteLevel alone, each character of a token stands for one byte."""
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None:
        return []
    return [step["type"] for step in decoder.get("decoders", [decoder])]


def token_bytes(backend: tokenizers.Tokenizer, count: int) -> list[bytes]:
    """What each of so many ids adds to a text that has begun; special tokens and ids without a token add nothing.

    Raises UserError where that depends on the tokens around it.
    """
    steps, added = decoder_steps(backend), backend.get_added_tokens_decoder()
    if steps == ["ByteLevel"]:
        special = {id_ for id_, token in added.items() if token.special}
        tokens = ("" if id_ in special else backend.id_to_token(id_) or "" for id_ in range(count))
        return [_of_byte_level(token) for token in tokens]
    if not steps or not APART.issuperset(steps):
        raise UserError(f"what a token stands for depends on those around it (decoder: {', '.join(steps) or 'none'})")

    decode: Callable[[list[int]], str] = backend.decode
    first = next((id_ for id_ in range(count) if decode([id_]).isalnum()), None)
    if first is None:
        raise UserError("no token of the tokenizer is a letter or a digit")
    start = len(decode([first]))
    pieces = [text[start:].encode() for text in backend.decode_batch([[first, id_] for id_ in range(count)])]
    if "ByteFallback" in steps:
        for value in range(256):
            if (id_ := backend.token_to_id(f"<0x{value:02X}>")) is not None:
                pieces[id_] = bytes([value])
    return pieces


def _of_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:  # an added token, which is text as it stands
        return token.encode()
