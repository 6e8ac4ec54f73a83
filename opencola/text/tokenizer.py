"""Text to token ids and back: byte-level BPE, or whatever a given `tokenizer.json` holds."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from opencola.errors import UserError
from opencola.paths import home
from opencola.storage import write_text
from opencola.text.token_bytes import decoder_steps, token_bytes

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SMALLEST_VOCABULARY = 258  # of a trained tokenizer: all bytes and the two tokens

# Names that tokenizer files in circulation give to the two tokens we need, commonest first.
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")
PAD_NAMES = (PADDING, "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Lossless text <-> ids. Text is only ever text: special tokens are added by id, never read out of a document.

    Wraps the `tokenizers` library, so any `tokenizer.json` loads. Tokenizers trained here cut text into bytes and
    merge the frequent pairs (byte-level BPE), so every UTF-8 text survives `decode(encode(text))` unchanged.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str | None = None, pad: str | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`; `eos` and `pad` name these two tokens where their names are unusual.

        Raises UserError when a given name is not a token of the file.
        """
        # A file may ask for truncation or padding, which would silently change documents.
        backend.no_truncation()
        backend.no_padding()
        # Without this a document that contains the characters "<|endoftext|>" would end in the middle.
        backend.encode_special_tokens = True
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {token.content: id_ for id_, token in sorted(added.items())}
        self._eos_id = None if eos is None else self.special_id(eos)
        self._pad_id = None if pad is None else self.special_id(pad)
        self._vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        decoder = decoder_steps(backend)
        self._byte_level = decoder == ["ByteLevel"]
        names = (f"<0x{byte:02X}>" for byte in range(256)) if "ByteFallback" in decoder else ()
        self._special_ids = {id_ for id_, token in added.items() if token.special}  # which leave no text
        self._byte_ids = {id_ for name in names if (id_ := backend.token_to_id(name)) is not None}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> "Tokenizer":
        """Learn byte-level BPE merges from `texts`; the same texts give the same tokenizer.

        Ids 0 and 1 are `<|endoftext|>` and `<|pad|>`, then come further `special` tokens, the 256 bytes, and the
        merges. Little text may hold fewer merges than asked for: read `vocab_size` afterwards. Raises UserError for a
        size below 258 (more with `special`), and for an empty or repeated name.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        names = [END_OF_TEXT, PADDING, *special]
        if "" in names or len({*names}) < len(names):
            raise UserError(f"special tokens need different names, but are {', '.join(map(repr, names))}")
        smallest = SMALLEST_VOCABULARY + len(special)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(names)} special tokens need {smallest}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            # Sorted, because the library's alphabet comes in no fixed order and would otherwise settle ties.
            initial_alphabet=sorted(alphabet),
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path, eos: str | None = None, pad: str | None = None) -> "Tokenizer":
        """Load a `tokenizer.json`, given as the file or as the folder that holds it.

        Where the two tokens have no usual names, `tokenizer_config.json` (eos_token, pad_token) or `config.json`
        (eos_token_id, pad_token_id) beside it tell which they are.
        Raises FileNotFoundError when there is none, UserError when it is not a tokenizer file.
        """
        file = home(path)
        if file.is_dir():
            file = file / FILE_NAME
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}: give a {FILE_NAME} or the folder that holds one")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8-sig"))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{file} is not a Hugging Face tokenizer file: {_one_line(error)}") from error
        tokenizer = cls(backend)
        named = {"eos": eos, "pad": pad}
        for role, usual in (("eos", END_NAMES), ("pad", PAD_NAMES)):
            if named[role] is None and not any(name in tokenizer._added for name in usual):
                named[role] = tokenizer._named_beside(file.parent, role)
        return cls(backend, **named)

    def _named_beside(self, folder: Path, role: str) -> str | None:
        """What the files that come with a tokenizer call the token of a role, eos or pad; None where none names one
        of its own special tokens."""
        names = {id_: name for name, id_ in self._added.items()}
        for file, key in ((CONFIG_NAME, f"{role}_token"), ("config.json", f"{role}_token_id")):
            try:
                value = json.loads((folder / file).read_text(encoding="utf-8")).get(key)
            except (OSError, ValueError, AttributeError):  # whoever needs such a file reads and checks it
                continue
            value = value.get("content") if isinstance(value, dict) else value
            value = next(iter(value), None) if isinstance(value, list) else value
            name = names.get(value) if isinstance(value, int) else value
            if isinstance(name, str) and name in self._added:
                return name
        return None

    def save(self, path: str | Path) -> Path:
        """Write the tokenizer to a `.json` file, or as `tokenizer.json` into a folder; return the file's path.

        A reader (or a crash) never sees half a file.
        """
        file = Path(path)
        if file.suffix != ".json" or file.is_dir():
            file = file / FILE_NAME
        write_text(file, self._backend.to_str(pretty=True))
        self._save_names(file.with_name(CONFIG_NAME))
        return file

    def _save_names(self, file: Path) -> None:
        """Write which tokens end a text and fill up, where their names do not tell: `load` reads it."""
        chosen = {"eos_token": self._eos_id, "pad_token": self._pad_id}
        names = {id_: name for name, id_ in self._added.items()}
        if values := {key: names[id_] for key, id_ in chosen.items() if id_ is not None}:
            write_text(file, json.dumps(values, indent=2) + "\n")

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the largest id (added tokens and gaps included) plus one."""
        return self._vocab_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides how text becomes ids: the same for the same tokenizer, however its file is laid
        out.
        """
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    @property
    def eos_id(self) -> int:
        """The token that ends a document. Raises UserError where neither a usual name nor a file beside it tells."""
        return self._find(self._eos_id, END_NAMES, "eos")

    @property
    def pad_id(self) -> int:
        """The token that fills up a row. Raises UserError where neither a usual name nor a file beside it tells."""
        return self._find(self._pad_id, PAD_NAMES, "pad")

    def special_id(self, name: str) -> int:
        """The id of the special token `name`, such as `<|im_end|>`. Raises UserError, with the names there are."""
        if name not in self._added:
            known = ", ".join(self._added) or "none"
            raise UserError(f"the tokenizer has no special token {name!r}; it has: {known}")
        return self._added[name]

    @cached_property
    def bytes(self) -> list[bytes]:
        """What each token adds to a text that has begun (`token_bytes`): nothing, if it is a special one."""
        return token_bytes(self._backend, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with nothing added in front or behind."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all processor cores."""
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_pair(self, prompt: str, continuation: str, whole_tokens: bool = False) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of what follows it: the whole text's, cut between the two, whenever that can be.

        White space at the prompt's end that a token of the whole holds together with what follows goes to the
        continuation, as tokenizers have it. Where a token holds more of the prompt than that, each is encoded by
        itself, if that gives the same text; if not (tokenizers that mark where words begin would begin one), or with
        `whole_tokens`, the token belongs to the continuation.
        """
        first, whole = self.encode(prompt), self.encode(prompt + continuation)
        count = num_shared(first, whole)
        over = count < len(first) and not whole_tokens
        if over and self.decode(whole[:count]).rstrip() != self.decode(first).rstrip():
            alone = self.encode(continuation)
            if self.decode(first + alone) == self.decode(whole):
                return first, alone
        return whole[:count], whole[count:]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are not text and leave no trace. Broken UTF-8 becomes U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def settled(self, ids: Sequence[int]) -> str:
        """The beginning of the text of token ids that no further ids can change."""
        end = len(ids)
        # The decoder reads neighbouring bytes as one: of a run with a broken end, none is a character.
        while self._byte_ids and end and int(ids[end - 1]) in self._byte_ids | self._special_ids:
            end -= 1
        return self.decode(ids[:end]).rstrip(UNFINISHED)

    def num_bytes(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes that the ids stand for, special tokens 0: the denominator of bits per byte.

        For byte-level tokenizers this is exact even where a cut divides a character: the parts add up to the whole.
        """
        if not self._byte_level:
            return len(self.decode(ids).encode())
        return sum(len(self.bytes[id_]) for id_ in map(int, ids) if id_ < self.vocab_size)

    @property
    def joins(self) -> bool:
        """Whether texts of parts of ids, each of whole characters, are together the text of the whole."""
        return self._byte_level

    def stream(self) -> "TextStream":
        """A decoder for ids that arrive block by block."""
        return TextStream(self)

    def _find(self, chosen: int | None, names: Sequence[str], role: str) -> int:
        if chosen is not None:
            return chosen
        for name in names:
            if name in self._added:
                return self._added[name]
        known = ", ".join(self._added) or "none"
        raise UserError(
            f"the tokenizer names no usual {role} token, nor does {CONFIG_NAME} beside it: write "
            f'{{"{role}_token": NAME}} into that file, with one of its special tokens: {known}'
        )


class TextStream:
    """Decodes ids that arrive in pieces; a character cut between two pieces comes out whole, once it is complete.

    What `push` and finally `close` return joins to `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        """Those whose text is not all there, or may still change."""
        self._text = ""
        """What was returned of theirs."""

    def push(self, ids: Sequence[int]) -> str:
        """Take the next ids (possibly none) and return the text that they complete."""
        self._ids.extend(int(id_) for id_ in ids)
        if not self._tokenizer.joins:  # then always from the beginning, which decoders may treat differently
            return self._advance(self._tokenizer.settled(self._ids))
        text = self._tokenizer.decode(self._ids)
        settled = text.rstrip(UNFINISHED)
        new = self._advance(settled)
        if settled == text:
            self._ids, self._text = [], ""
        return new

    def rest(self) -> str:
        """What is held back as possibly unfinished (U+FFFD where it stays unfinished)."""
        return self._tokenizer.decode(self._ids)[len(self._text) :]

    def close(self) -> str:
        """The same, when no more ids come."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._text) :]
        self._text += new
        return new


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    if first[: len(second)] == second:
        return len(second)
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (here, there) in pairs if here != there), min(len(first), len(second)))


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
