"""Tokenizer: trained on the corpus, or loaded; in the end always a folder of Hugging Face files.

`bpe` is byte-level byte-pair encoding (R. Sennrich et al., "Neural Machine Translation of Rare
Words with Subword Units", ACL 2016; on bytes: A. Radford et al., "Language Models are Unsupervised
Multitask Learners", 2019): every text can be written, and what is decoded is what was encoded.
`bytes` is the same without merges: a token is a byte, as in byte language models. `load` takes the
tokenizer of a model, from a folder or the hub.

Nothing is ever run that comes with a tokenizer: no remote code, and only the fast (Rust) form is
used, whose file is plain JSON.

Artifact:
    tokenizer/     tokenizer.json, tokenizer_config.json, ...
    facts          vocabulary, special tokens, bytes per token on the validation split
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from goldcrest.cluster.api import Artifact, Config, InputError, InputFiles, Output, task
from goldcrest.tasks.language.examples import read_examples

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

_BYTES = 256
_FACT_ROWS = 1000  # of the validation split, for bytes per token
_START = "<|startoftranscript|>"  # Whisper's
_PLAIN = threading.Lock()
_NEVER = 1 << 62  # for `model_max_length`: the model's own limit is in the model's config


class TokenizerConfig(Config):
    """Which tokenizer, and its special tokens."""

    method: Literal["bpe", "bytes", "load"] = Field(
        "bpe", description="bpe: trained on the corpus; bytes: a token per byte; load: given"
    )
    vocab_size: int = Field(
        1024,
        ge=_BYTES + 4,
        description="bpe: greatest number of tokens, special ones included; a small corpus may "
        "have fewer",
    )
    min_frequency: int = Field(
        2, ge=1, description="bpe: pairs that occur less often are not merged"
    )
    pad: str = Field("<pad>", min_length=1, description="bpe, bytes: token that fills up, id 0")
    bos: str = Field("<s>", min_length=1, description="bpe, bytes: begins a document, id 1")
    eos: str = Field("</s>", min_length=1, description="bpe, bytes: ends a document, id 2")
    mask: str | None = Field(
        None, min_length=1, description="bpe, bytes: hides a token from a masked model, id 3"
    )
    path: Annotated[str | None, InputFiles] = Field(
        None, description="load: a folder with tokenizer.json: that of a model, or a bundle"
    )
    hub: str | None = Field(
        None, description="load: name on the Hugging Face hub, e.g. openai-community/gpt2"
    )
    revision: str | None = Field(
        None, description="load: commit or tag on the hub; give a commit, names move"
    )

    prefix: tuple[str, ...] = Field(
        (),
        description="load, speech: special tokens that begin every transcript after the model's "
        "start token, e.g. <|hi|>, <|transcribe|>, <|notimestamps|>; none: the tokenizer's own",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.method == "load") != ((self.path is None) != (self.hub is None)):
            raise ValueError(
                "method load takes exactly one of path and hub, the other methods take neither"
            )
        if self.revision is not None and self.hub is None:
            raise ValueError("revision: only names on the hub have revisions")
        if self.prefix and self.method != "load":
            raise ValueError("prefix: only a tokenizer that is loaded has such tokens")
        if len(set(self.special)) != len(self.special):
            raise ValueError(f"the special tokens must differ: {', '.join(self.special)}")
        return self

    @property
    def special(self) -> list[str]:
        """Special tokens in the order of their ids."""
        return [self.pad, self.bos, self.eos, *([self.mask] if self.mask else [])]


@task(cpus=1, seeded=False, timeout="12h")
def tokenizer(cfg: TokenizerConfig, corpus: Artifact, out: Output, **more: Artifact) -> None:
    """Train or load the tokenizer; `more` are further corpora to train on."""
    corpora = [corpus, *(more[name] for name in sorted(more))]
    made = _load(cfg) if cfg.method == "load" else _trained(cfg, corpora)
    folder = out.file("tokenizer/tokenizer.json").parent
    made.save_pretrained(folder)
    made = load_tokenizer(folder)  # what later steps will see is what is measured
    facts = {
        "method": cfg.method,
        "vocabulary": len(made),
        "special": {
            name: made.convert_tokens_to_ids(token)
            for name, token in made.special_tokens_map.items()
            if isinstance(token, str)
        },
        "bytes_per_token": _bytes_per_token(made, corpus),
    }
    out.json("facts", facts)
    out.metrics(tokenizer=facts)


def tokenizer_folder(made: Artifact) -> Path:
    """The folder of a tokenizer artifact, every file in it verified."""
    members = [name for name in made.manifest["files"] if name.startswith("tokenizer/")]
    return [made.file(name) for name in members][-1].parent


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, from its own files alone; no code of the folder is run.

    Raises InputError where there is none, or none that can be read.
    """
    from transformers import PreTrainedTokenizerFast

    if not (Path(folder) / "tokenizer.json").is_file():
        raise InputError(f"{folder} holds no tokenizer: there is no tokenizer.json in it")
    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"the tokenizer in {folder} can't be read: {error}") from error
    return loaded


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Encoding]:
    """Texts as tokens with offsets in characters, without special tokens.

    A text that spells a special token, such as `</s>`, is encoded as the letters that it is made
    of: no row of a corpus may end a document or hide itself as padding. Threads may share the
    tokenizer here; whoever encodes special tokens with it meanwhile needs a copy.
    """
    backend = tokenizer.backend_tokenizer
    with _PLAIN:  # the flag is the tokenizer's, not the call's
        before, backend.encode_special_tokens = backend.encode_special_tokens, True
        try:
            return list(backend.encode_batch(list(texts), add_special_tokens=False))
        finally:
            backend.encode_special_tokens = before


def transcript_prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that begin every transcript after the model's start token: what the tokenizer itself puts
    before a text, but the start of the transcript, which the model's config names."""
    ids = list(tokenizer.backend_tokenizer.encode("").ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids[1:] if ids and tokenizer.convert_ids_to_tokens(ids[0]) == _START else ids


def _begin_with(tokenizer: PreTrainedTokenizerFast, prefix: Sequence[str]) -> None:
    """Make the tokenizer put `prefix` before a text, and eos behind it (its file then says so)."""
    from tokenizers.processors import TemplateProcessing

    known = tokenizer.get_vocab()
    strange = [each for each in prefix if each not in known]
    if strange:
        raise InputError(f"tokenizer.prefix: the tokenizer has no token '{strange[0]}'")
    eos = str(tokenizer.eos_token)
    special = [(each, known[each]) for each in (*prefix, eos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*prefix, "$A", eos], special_tokens=special
    )


def _trained(cfg: TokenizerConfig, corpora: Sequence[Artifact]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    backend = _byte_tokenizer(cfg) if cfg.method == "bytes" else _bpe_tokenizer(cfg, corpora)
    names = {"pad_token": cfg.pad, "bos_token": cfg.bos, "eos_token": cfg.eos}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=_NEVER,
        **names,
        **({"mask_token": cfg.mask} if cfg.mask else {}),
    )


def _bpe_tokenizer(cfg: TokenizerConfig, corpora: Sequence[Artifact]) -> Tokenizer:
    """Merges learned from the training splits; ties are broken by ids, so it is deterministic."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    _on_bytes(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        min_frequency=cfg.min_frequency,
        special_tokens=cfg.special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(corpora), trainer)
    return backend


def _byte_tokenizer(cfg: TokenizerConfig) -> Tokenizer:
    """A token per byte: the id of a byte is its value plus the number of special tokens."""
    from tokenizers import AddedToken, Tokenizer, models

    names = [*cfg.special, *(_byte_name(value) for value in range(_BYTES))]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    _on_bytes(backend)
    backend.add_special_tokens([AddedToken(name, special=True) for name in cfg.special])
    return backend


def _on_bytes(backend: Tokenizer) -> None:
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()


def _byte_name(value: int) -> str:
    """The printable letter that stands for a byte in byte-level vocabularies (GPT-2's encoder.py):
    the byte itself where Latin-1 prints it, else the next letter from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [each for each in range(_BYTES) if each not in printable]
    return chr(value) if value in printable else chr(_BYTES + others.index(value))


def _texts(corpora: Iterable[Artifact]) -> Iterator[str]:
    for corpus in corpora:
        for example in read_examples(corpus, "train"):
            yield example.prompt + example.answer


def _load(cfg: TokenizerConfig) -> PreTrainedTokenizerFast:
    """A tokenizer that was given, in its fast form, with a token to pad with."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source: dict[str, Any] = (
        {"pretrained_model_name_or_path": _own_files(cfg.path), "local_files_only": True}
        if cfg.path is not None
        else {"pretrained_model_name_or_path": cfg.hub, "revision": cfg.revision or "main"}
    )
    try:
        loaded = AutoTokenizer.from_pretrained(**source, trust_remote_code=False, use_fast=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        place = cfg.path or f"the hub's {cfg.hub}"
        raise InputError(f"no tokenizer can be loaded from {place}: {error}") from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise InputError(f"{cfg.path or cfg.hub} has no fast tokenizer (tokenizer.json)")
    if loaded.eos_token is None and loaded.sep_token is not None:
        # BERT's kind: [CLS] begins a text, [SEP] ends it.
        loaded.eos_token = loaded.sep_token
        loaded.bos_token = loaded.bos_token or loaded.cls_token
    if loaded.eos_token is None:
        raise InputError(
            f"the tokenizer of {cfg.path or cfg.hub} has no token that ends a text (eos)",
            hint="a model can't learn where an answer ends: take another tokenizer, or train one",
        )
    if cfg.prefix:
        _begin_with(loaded, cfg.prefix)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token  # padding is masked: any token will do
    return loaded


def _own_files(folder: str) -> str:
    """The folder itself; of a bundle, the folder in it that holds the tokenizer."""
    inner = Path(folder) / "tokenizer"
    return str(inner) if (inner / "tokenizer.json").is_file() else folder


def _bytes_per_token(made: PreTrainedTokenizerFast, corpus: Artifact) -> float | None:
    """UTF-8 bytes per token on the validation split (training, if that is empty)."""
    for split in ("validation", "train"):
        rows = itertools.islice(read_examples(corpus, split), _FACT_ROWS)
        texts = [row.prompt + row.answer for row in rows]
        if texts:
            tokens = sum(len(each.ids) for each in encode_plain(made, texts))
            return round(sum(len(text.encode()) for text in texts) / max(tokens, 1), 4)
    return None
