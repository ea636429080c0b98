"""The language pipeline: text, or speech with its texts -> a dense model -> sparse, INT8, INT4.

    corpus -> tokenizer -> tokens -> pretrain -> finetune -> sparse_50, sparse_75, ... -> bundles
                                                     \\-> int8, int4

Pretraining has a corpus of its own where one is given, else it reads the task's. It can be the
mere loading of a trained model (`pretrain.training: null`). INT8 and INT4 are made of the dense
model, or of a sparse one (`int8_of: sparse_75`). Pruning and quantization calibrate on the task's
training rows, or on a corpus of their own (`calibration_corpus`). With `pretrain.model.family:
speech` the corpus is recordings with their texts, read as `speech` says.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from goldcrest.cluster import api
from goldcrest.cluster.profile import StepResources
from goldcrest.tasks.language.evaluate import EvaluateTextConfig, evaluate_text
from goldcrest.tasks.language.finetune import FinetuneConfig, finetune
from goldcrest.tasks.language.generation import WRITERS
from goldcrest.tasks.language.harness import HarnessConfig, harness
from goldcrest.tasks.language.layout import check_layout
from goldcrest.tasks.language.prepare import TextConfig, prepare_text
from goldcrest.tasks.language.prepare_speech import SpeechCorpusConfig, prepare_speech
from goldcrest.tasks.language.pretrain import PretrainConfig, pretrain
from goldcrest.tasks.language.publish import PublishTextConfig, publish_text
from goldcrest.tasks.language.quantize_int4 import Int4Config, quantize_int4
from goldcrest.tasks.language.quantize_int8 import QuantizeInt8Config, quantize_int8
from goldcrest.tasks.language.sparse_finetune import (
    LevelsConfig,
    level_name,
    sparse_finetune_text,
)
from goldcrest.tasks.language.tokenizer import TokenizerConfig, tokenizer
from goldcrest.tasks.language.tokens import TokensConfig, tokens

DESCRIPTION = "text, or speech with its texts, to dense, sparse, INT8 and INT4 language models"


class Config(api.Config):
    """The configs of the steps, in the order of the chain; a part that is null is left out."""

    seed: int = Field(0, ge=0, description="seed of every random choice in the run")
    steps: dict[str, StepResources] = Field(
        {},
        description="patterns of step names -> resources and timeout in place of the tasks' own; "
        "what a cluster profile says goes first",
    )
    corpus: TextConfig = Field(TextConfig(), description="the task: prompts and answers, or text")
    speech: SpeechCorpusConfig = Field(
        SpeechCorpusConfig(),
        description="family speech: how the recordings at corpus.paths (--corpus) are read",
    )
    pretrain_corpus: TextConfig | None = Field(
        None, description="text to learn the language from; null: the task's own"
    )
    calibration_corpus: TextConfig | None = Field(
        None,
        description="text that pruning and quantization calibrate on; null: the task's own",
    )
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="how text becomes tokens")
    tokens: TokensConfig = Field(TokensConfig(), description="rows of tokens of the task")
    pretrain_tokens: TokensConfig = Field(
        TokensConfig(pack="everything"), description="rows of tokens of pretraining"
    )
    calibration_tokens: TokensConfig = Field(
        TokensConfig(pack="everything"), description="rows of tokens of calibration_corpus"
    )
    pretrain: PretrainConfig = Field(
        PretrainConfig(), description="the model, and its first training"
    )
    finetune: FinetuneConfig | None = Field(
        FinetuneConfig(), description="dense training on the task; null: pretraining is all"
    )
    sparse: LevelsConfig | None = Field(
        LevelsConfig(), description="sparsities, pruning and sparse fine-tuning"
    )
    int8: QuantizeInt8Config | None = Field(
        QuantizeInt8Config(), description="INT8 weights and activations"
    )
    int8_of: str = Field("dense", description="the model that becomes INT8: dense, sparse_75, ...")
    int4: Int4Config | None = Field(Int4Config(), description="INT4 weights by a search of recipes")
    int4_of: str = Field("dense", description="the model that becomes INT4: dense, sparse_75, ...")
    evaluate: EvaluateTextConfig = Field(EvaluateTextConfig(), description="what is measured")
    publish: PublishTextConfig = Field(PublishTextConfig(), description="the finished bundles")
    harness: HarnessConfig | None = Field(
        None,
        description="lm-evaluation-harness on the finished bundles (causal and encoder-decoder)",
    )

    @model_validator(mode="after")
    def _one_family(self) -> Self:
        family = self.pretrain.model.family
        used = {
            "tokens": True,
            "pretrain_tokens": self.pretrain.training is not None,
            "calibration_tokens": self.calibration_corpus is not None,
        }
        for name in (name for name, is_used in used.items() if is_used):
            made_for = getattr(self, name).family
            if made_for != family:
                raise ValueError(
                    f"{name}.family is {made_for}, but pretrain.model.family is {family}: rows of "
                    "tokens are made for one kind of model"
                )
        return self

    @model_validator(mode="after")
    def _speech_or_text(self) -> Self:
        model, speech = self.pretrain.model, self.speech
        if model.family != "speech":
            if speech != SpeechCorpusConfig():
                raise ValueError(
                    f"speech is for models of the family speech; this one is {model.family}"
                )
            return self
        where = {"paths": self.corpus.paths, "eval_paths": self.corpus.eval_paths}
        further = (self.pretrain_corpus, self.calibration_corpus)
        if self.corpus != TextConfig(**where) or further != (None, None):
            raise ValueError(
                "a speech model's corpus is recordings: say under speech how they are read; of "
                "corpus only paths and eval_paths are looked at, and pretrain_corpus and "
                "calibration_corpus must be null"
            )
        if speech.paths or speech.eval_paths:
            raise ValueError("speech.paths are those of corpus.paths: give them there (--corpus)")
        if model.source is None:
            _check_window(self)
        return self

    @model_validator(mode="after")
    def _calibration_tokens_have_a_corpus(self) -> Self:
        default = type(self).model_fields["calibration_tokens"].default
        if self.calibration_corpus is None and self.calibration_tokens != default:
            raise ValueError(
                "calibration_tokens is set, but calibration_corpus is null: the task's own rows "
                "(tokens) are calibrated on; set calibration_corpus, or leave both out"
            )
        return self

    @model_validator(mode="after")
    def _pretraining_reads_its_corpus(self) -> Self:
        # pretrain_tokens may stay: a config that is told to load a model instead has them.
        if self.pretrain.training is None and self.pretrain_corpus is not None:
            raise ValueError(
                "pretrain_corpus is set, but pretrain.training is null: the model is taken as it "
                "is and nothing is read for it; leave pretrain_corpus out, or set pretrain.training"
            )
        return self

    @model_validator(mode="after")
    def _bundles_have_the_names_of_their_models(self) -> Self:
        if self.publish.name is not None:
            raise ValueError(
                f"publish.name is '{self.publish.name}', but a run publishes several models: each "
                "bundle tells what was measured of its own (dense, sparse_75, int8); leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_model_keeps_its_tokenizer(self) -> Self:
        source = self.pretrain.model.source
        if (
            source is not None
            and self.pretrain.training is None
            and self.tokenizer.method != "load"
        ):
            kind = "path" if self.pretrain.model.path is not None else "hub"
            raise ValueError(
                f"tokenizer.method is {self.tokenizer.method}, but the model {source} is taken as "
                "it is: it reads only the tokens of its own tokenizer; set tokenizer to "
                f"{{method: load, {kind}: {source}}}"
            )
        return self

    @model_validator(mode="after")
    def _the_harness_reads_answers(self) -> Self:
        family = self.pretrain.model.family
        if self.harness is not None and family not in WRITERS:
            raise ValueError(
                f"harness is set, but a model of family {family} does not write text after a prompt"
            )
        return self

    @model_validator(mode="after")
    def _metrics_are_of_answers(self) -> Self:
        if self.pretrain.model.family == "masked" and self.evaluate.metrics:
            raise ValueError(
                f"evaluate.metrics are {', '.join(self.evaluate.metrics)}, but a model of family "
                "masked does not write answers: set them to []; perplexity and bits per character "
                "are measured"
            )
        return self

    @model_validator(mode="after")
    def _quantized_models_exist(self) -> Self:
        levels = () if self.sparse is None else self.sparse.levels
        known = ["dense", *(level_name(level) for level in levels)]
        for made in ("int8", "int4"):
            name = getattr(self, f"{made}_of")
            if getattr(self, made) is not None and name not in known:
                raise ValueError(
                    f"{made}_of is '{name}'; models of this run: {', '.join(known)}; "
                    f"or leave it out: -o {made}=null"
                )
        return self

    @model_validator(mode="after")
    def _layers_can_be_compressed(self) -> Self:
        """Only the model can tell, and the steps that compress it come hours later."""
        sparse = self.sparse
        recipes = [] if sparse is None else [sparse.step(level) for level in sparse.levels]
        check_layout(self.pretrain.model, recipes, self.int8, self.int4)
        return self


def _check_window(cfg: Config) -> None:
    """ValueError where a fresh speech model can't hear all that the corpus may hold."""
    settings = cfg.pretrain.model.settings
    for name in ("max_source_positions", "num_mel_bins"):
        if name not in settings:
            raise ValueError(
                f"pretrain.model.architecture is {cfg.pretrain.model.architecture}, which does not "
                "read Whisper's features: a fresh speech model is a whisper"
            )
    seconds, bins = settings["max_source_positions"] / 50, settings["num_mel_bins"]
    if cfg.speech.max_seconds > seconds:
        raise ValueError(
            f"speech.max_seconds is {cfg.speech.max_seconds:g}, but a model of "
            f"{settings['max_source_positions']} max_source_positions hears {seconds:g} s"
        )
    if cfg.tokens.speech.mel_bins != bins:
        raise ValueError(
            f"tokens.speech.mel_bins is {cfg.tokens.speech.mel_bins}, but "
            f"pretrain.model.settings.num_mel_bins is {bins}"
        )


def build(cfg: Config) -> list[Any]:
    """Bind the chain; its ends are the finished bundles."""
    corpus = _corpus(cfg)
    raw = None
    if cfg.pretrain_corpus is not None:
        raw = prepare_text.bind(cfg.pretrain_corpus, name="pretrain_corpus", seed=cfg.seed)
    more = {} if raw is None else {"pretrain_corpus": raw}
    words = tokenizer.bind(cfg.tokenizer, corpus, **more)
    rows = tokens.bind(cfg.tokens, corpus, words)
    dense = _dense(cfg, rows, words, _pretraining_rows(cfg, corpus, raw, rows, words))
    models = _models(cfg, dense, rows, _calibration_rows(cfg, words))
    result = evaluate_text.bind(
        cfg.evaluate, corpus, rows, seed=cfg.seed, name="evaluate", **models
    )
    bundles = {
        name: publish_text.bind(cfg.publish, node, result, name=f"bundle-{name}")
        for name, node in models.items()
    }
    if cfg.harness is None:
        return list(bundles.values())
    return [*bundles.values(), harness.bind(cfg.harness, seed=cfg.seed, **bundles)]


def _corpus(cfg: Config) -> Any:
    """The task: prompts and answers, or recordings with their texts."""
    if cfg.pretrain.model.family != "speech":
        return prepare_text.bind(cfg.corpus, name="corpus", seed=cfg.seed)
    where = {"paths": cfg.corpus.paths, "eval_paths": cfg.corpus.eval_paths}
    spoken = SpeechCorpusConfig(**{**cfg.speech.model_dump(), **where})
    return prepare_speech.bind(spoken, name="corpus", seed=cfg.seed)


def _pretraining_rows(cfg: Config, corpus: Any, raw: Any, rows: Any, words: Any) -> Any:
    """What pretraining reads: None where it only loads a model."""
    if cfg.pretrain.training is None:
        return None
    if raw is None and cfg.pretrain_tokens == cfg.tokens:
        return rows
    source = corpus if raw is None else raw
    return tokens.bind(cfg.pretrain_tokens, source, words, name="pretrain_tokens")


def _calibration_rows(cfg: Config, words: Any) -> Any:
    """What pruning and quantization calibrate on: None where that is the task's own rows."""
    if cfg.calibration_corpus is None:
        return None
    corpus = prepare_text.bind(cfg.calibration_corpus, name="calibration_corpus", seed=cfg.seed)
    return tokens.bind(cfg.calibration_tokens, corpus, words, name="calibration_tokens")


def _dense(cfg: Config, rows: Any, words: Any, pretraining: Any) -> Any:
    """The model that the others are made of."""
    model = pretrain.bind(cfg.pretrain, words, pretraining, seed=cfg.seed)
    if cfg.finetune is None:
        return model
    return finetune.bind(cfg.finetune, model, rows, seed=cfg.seed)


def _models(cfg: Config, dense: Any, rows: Any, calibration: Any) -> dict[str, Any]:
    """The models by the names of their bundles, the dense one first."""
    models = {"dense": dense}
    previous = None
    for level in () if cfg.sparse is None else cfg.sparse.levels:
        assert cfg.sparse is not None
        name = level_name(level)
        models[name] = sparse_finetune_text.bind(
            cfg.sparse.step(level), dense, rows, previous, calibration, name=name, seed=cfg.seed
        )
        previous = models[name] if cfg.sparse.gradual else None
    sources = dict(models)
    if cfg.int8 is not None:
        source = sources[cfg.int8_of]
        given = rows if calibration is None else calibration
        models["int8"] = quantize_int8.bind(cfg.int8, source, given, name="int8", seed=cfg.seed)
    if cfg.int4 is not None:
        source = sources[cfg.int4_of]
        models["int4"] = quantize_int4.bind(
            cfg.int4, source, rows, calibration, name="int4", seed=cfg.seed
        )
    return models
