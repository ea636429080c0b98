"""Prepare text: files of any kind -> examples in Parquet shards, split so that nothing leaks.

Templates in the config make rows into prompts and answers; what can't be used goes to quarantine
with its place and a reason. Rows stream from file to shard, one at a time.

Artifact (see tasks/language/examples.py and splits.py):
    train/         a row for every answer
    validation/    a row for every prompt, with all its answers in `references`
    test/          likewise
    quarantine     file, line, reason (of the first 100 000 bad rows)
    facts          files by role, rows, characters and bytes of every split
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
from pydantic import Field, model_validator

from goldcrest.cluster.api import Config, InputError, InputFiles, Output, task
from goldcrest.tasks.data import synthetic_text
from goldcrest.tasks.data.corpus import as_text
from goldcrest.tasks.data.documents import DocumentConfig
from goldcrest.tasks.data.templates import FieldError, Template
from goldcrest.tasks.data.text import (
    RoleConfig,
    Row,
    TextFile,
    corpus_names,
    read_rows,
    text_files,
)
from goldcrest.tasks.language.cleaning import (
    Replacements,
    check_replacements,
    check_text,
    replaced,
)
from goldcrest.tasks.language.examples import SCHEMA, SPLITS, Example, Split
from goldcrest.tasks.language.splits import EvaluationRows, HoldOut, Item

_TABLE_ROWS = 512
_KEPT_REASONS = 100_000
_NOTE_EVERY = 5_000  # rows
_ODD_ROWS = 100  # without known fields at the begin of a file, before it is given up
_HOW_TO_READ = 'say what to read, e.g. corpus.prompt="{question}\\n" and corpus.answer="{answer}"'
_QUARANTINE = pa.schema([("file", pa.string()), ("line", pa.int64()), ("reason", pa.string())])
# What is read where the config has no templates: the first line whose fields are all there.
KNOWN_FIELDS = (
    ("{prompt}\n", "{answer}"),
    ("{prompt}\n", "{completion}"),
    ("{question}\n", "{answer}"),
    ("{instruction}\n", "{output}"),
    ("{mr}\n", "{ref}"),
    ("{source}\n", "{target}"),
    ("", "{text}"),
)


class EmbeddedTextConfig(Config):
    """The corpus that Goldcrest writes itself when no `paths` are given."""

    meanings: int = Field(
        1500,
        ge=4,
        le=synthetic_text.MEANINGS,
        description="distinct prompts, each with three right answers",
    )


class TextConfig(Config):
    """Which text is read, and how a row becomes a prompt and an answer."""

    paths: Annotated[tuple[str, ...], InputFiles] = Field(
        (), description="corpora: files, folders or datasets://NAME; none: the embedded one"
    )
    eval_paths: Annotated[tuple[str, ...], InputFiles] = Field(
        (),
        description="corpora for evaluation only: for testing, or for validation if their files "
        "are named so; they replace the files of `paths` that are for the same",
    )
    names: tuple[str, ...] = Field(
        (), description="names of the corpora in ids; none: those of their files and folders"
    )
    roles: RoleConfig = Field(RoleConfig(), description="which files of `paths` are for what")
    prompt: str | None = Field(
        None,
        description='template over a row\'s fields, e.g. "{question}\\n"; "" for plain text; None '
        "(with `answer` None): by the names of the fields (text; prompt, answer; ...)",
    )
    answer: str | None = Field(
        None,
        description='template of the answer; a list in it, e.g. "{refs}", holds several answers',
    )
    join: tuple[str, ...] = Field(
        (" | ", " : "), description="what lists in templates are joined with, from the outermost"
    )
    replace_in_prompt: Replacements = Field(
        (), description="(regular expression, replacement) pairs, applied to prompts in order"
    )
    replace_in_answer: Replacements = Field(
        (), description="(regular expression, replacement) pairs, applied to answers in order"
    )
    documents: DocumentConfig = Field(
        DocumentConfig(), description="where documents of plain text files begin and end"
    )
    quoted: tuple[Literal["csv", "tsv"], ...] = Field(
        ("csv",), description="tables whose fields may be in double quotes; elsewhere, as letters"
    )
    embedded: EmbeddedTextConfig = Field(
        EmbeddedTextConfig(), description="the corpus written on the spot"
    )
    validation_share: float = Field(
        0.1, ge=0, lt=0.5, description="share of prompts held out where no file is for validation"
    )
    test_share: float = Field(
        0.1, ge=0, lt=0.5, description="share of prompts held out where no file is for testing"
    )
    max_train_rows: int | None = Field(
        None, ge=1, description="reading stops after this many rows for training"
    )
    max_eval_rows: int | None = Field(
        None, ge=1, description="prompts kept of each evaluation split, the first ones"
    )
    max_row_bytes: int = Field(
        1 << 20, ge=1, description="longer lines, documents and texts are quarantined (bytes)"
    )
    max_bad_share: float = Field(
        0.2, ge=0, le=1, description="share of rows that may be quarantined before it fails"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Names belong to ids, and a single file's name to its role: they must be in the key."""
        paths = (*self.paths, *self.eval_paths)
        if self.names and len(self.names) != len(paths):
            raise ValueError(f"{len(self.names)} names for {len(paths)} corpora")
        object.__setattr__(self, "names", self.names or corpus_names(paths))
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("give templates for both prompt and answer, or for neither")
        for template in (self.prompt, self.answer):
            Template(template or "")
        if self.answer is not None and not Template(self.answer).fields:
            raise ValueError(f"answer: '{self.answer}' names no field, e.g. {{answer}}")
        check_replacements((*self.replace_in_prompt, *self.replace_in_answer))
        return self


@task(version=2, cpus=1, retry_on=(OSError,), timeout="12h")
def prepare_text(cfg: TextConfig, out: Output) -> None:
    """Read, check and split the corpora (see the module docstring)."""
    files = _files_by_role(cfg)
    rows = _Rows(cfg, files, out)
    shares: dict[Split, float] = {"test": cfg.test_share, "validation": cfg.validation_share}
    open_splits = {split: share for split, share in shares.items() if not files[split]}
    counts = {split: _Count() for split in SPLITS}
    with EvaluationRows(out.scratch / "evaluation.sqlite") as evaluation:
        training = _training_items(rows, evaluation, HoldOut(open_splits, out.seed), cfg)
        _write(out, "train", (Example(i.id, i.prompt, i.answer) for i in training), counts["train"])
        rows.check()
        for split in ("validation", "test"):
            held = _first(evaluation.examples(split), cfg.max_eval_rows)
            _write(out, split, held, counts[split])
    if counts["train"].rows == 0:
        raise InputError(
            f"no row is left for training: of {rows.total} rows {rows.bad} can't be used, "
            f"{rows.repeated} have prompts that are in evaluation files too",
            hint="name files for training in corpus.roles.train, or lower corpus.test_share",
        )
    _report(rows, counts, out)


class _Count:
    """What was written of one split."""

    def __init__(self) -> None:
        self.rows = self.references = self.characters = self.bytes = 0

    def add(self, example: Example) -> None:
        self.rows += 1
        self.references += len(example.references)
        for text in (example.prompt, example.answer):
            self.characters += len(text)
            self.bytes += len(text.encode())


def _files_by_role(cfg: TextConfig) -> dict[str, list[TextFile]]:
    """The files of every split, and under "left out" those that are for nothing."""
    files: dict[str, list[TextFile]] = {split: [] for split in (*SPLITS, "left out")}
    replaced: set[str] = set()
    names = iter(cfg.names)
    of_paths = [(path, next(names)) for path in cfg.paths]
    for path, name in zip(cfg.eval_paths, names, strict=True):
        for file in text_files(path, name):
            role = "validation" if cfg.roles.of(file.inside) == "validation" else "test"
            files[role].append(file)
            replaced.add(role)
    for path, name in of_paths:
        for file in text_files(path, name):
            role = cfg.roles.of(file.inside) or "left out"
            files["left out" if role in replaced else role].append(file)
    if cfg.eval_paths and not cfg.paths:
        raise InputError("--eval-corpus without --corpus: there is nothing to train on")
    if cfg.paths and not files["train"]:
        raise InputError(
            f"no file is for training among {', '.join(f.name for f in _all(files)[:5])}",
            hint=_for_training(cfg, files),
        )
    return files


def _for_training(cfg: TextConfig, files: dict[str, list[TextFile]]) -> str:
    """How some of the files become training files: what another role claims goes there first."""
    role = next((each for each in ("validation", "test") if files[each]), None)
    if role is None:
        return f"none has a word of corpus.roles.train, which is {list(cfg.roles.train)}"
    return f"train on those for {role}: -o 'corpus.roles.{role}=[]' -o 'corpus.roles.train=[\"*\"]'"


def _all(files: dict[str, list[TextFile]]) -> list[TextFile]:
    return [file for each in files.values() for file in each]


class _Rows:
    """The items of all files, evaluation first; counts and quarantines what can't be used."""

    def __init__(self, cfg: TextConfig, files: dict[str, list[TextFile]], out: Output) -> None:
        self.cfg, self.files, self._out = cfg, files, out
        self.total = self.bad = 0
        self.repeated = 0  # left out of a split because an evaluation split has the prompt
        self.reasons: list[dict[str, Any]] = []

    def items(self, split: Split) -> Iterator[Item]:
        """The items of one split's files; of the embedded corpus, which is all for training."""
        if not self.cfg.paths:
            if split == "train":
                yield from self._embedded()
            return
        for file in self.files[split]:
            maker = _Maker(self.cfg, file)
            cfg = self.cfg
            for row in read_rows(
                file, cfg.documents, cfg.max_row_bytes, maker.columns, quoted=cfg.quoted
            ):
                yield from self._made(maker, file, row)
            maker.finish()

    def _made(self, maker: _Maker, file: TextFile, row: Row) -> Iterator[Item]:
        self.total += 1
        if self.total % _NOTE_EVERY == 0:
            self._out.progress(None, f"{self.total} rows, {self.bad} bad")
        try:
            if row.problem:
                raise FieldError(row.problem)
            made = maker.items(row)
        except FieldError as error:
            self.bad += 1
            if len(self.reasons) < _KEPT_REASONS:
                reason = {"file": file.name, "line": row.line, "reason": str(error)}
                self.reasons.append(reason)
            return
        yield from made

    def _embedded(self) -> Iterator[Item]:
        rows = synthetic_text.descriptions(self.cfg.embedded.meanings, self._out.seed)
        for number, (meaning, answers) in enumerate(rows):
            self.total += 1
            for which, answer in enumerate(answers):
                yield Item(f"embedded:{number}#{which}", f"{meaning}\n", answer)

    def check(self) -> None:
        """InputError if more rows than allowed can't be used, naming the first of them."""
        if self.bad > self.cfg.max_bad_share * self.total:
            examples = "; ".join(
                f"{r['file']}:{r['line']}: {r['reason']}" for r in self.reasons[:3]
            )
            raise InputError(
                f"{self.bad} of {self.total} rows can't be used, more than the allowed "
                f"{self.cfg.max_bad_share:.0%}: {examples}",
                hint="mend the files or the templates, or raise corpus.max_bad_share",
            )


class _Maker:
    """Makes the rows of one file into items, one for each of a row's answers."""

    def __init__(self, cfg: TextConfig, file: TextFile) -> None:
        self._cfg, self._file = cfg, file
        self._templates: tuple[Template, Template] | None = None
        self._odd: list[str] = []  # rows without known fields, before the first that has some
        self.columns: list[str] | None = None
        if cfg.prompt is not None and cfg.answer is not None:
            self._templates = Template(cfg.prompt), Template(cfg.answer)
            names = [name for template in self._templates for name in template.fields]
            # A column may itself be called `a.b`: where dots are written, leave nothing out.
            dotted = any(template.dotted for template in self._templates)
            self.columns = None if dotted else names

    def _known(self, row: Row) -> tuple[Template, Template]:
        """The templates whose fields the row has; after some odd rows the file is given up."""
        for texts in KNOWN_FIELDS:
            prompt, answer = map(Template, texts)
            if all(name in row.fields for name in (*prompt.fields, *answer.fields)):
                return prompt, answer
        problem = (
            f"no templates were given, and the fields "
            f"{', '.join(map(as_text, list(row.fields)[:20]))} are none of the known ones"
        )
        self._odd.append(f"{self._file.path}:{row.line}: {problem}")
        if len(self._odd) == _ODD_ROWS:
            self.finish()
        raise FieldError(problem)

    def finish(self) -> None:
        """InputError if there were rows, and none had known fields; it names the first."""
        if self._templates is None and self._odd:
            raise InputError(self._odd[0], hint=_HOW_TO_READ)

    def items(self, row: Row) -> list[Item]:
        """The row's items; FieldError says why there is none."""
        if self._templates is None:
            self._templates = self._known(row)
        cfg, (prompt_template, answer_template) = self._cfg, self._templates
        prompt = replaced(prompt_template.render(row.fields, cfg.join), cfg.replace_in_prompt)
        if prompt_template.fields:
            check_text("prompt", prompt, cfg.max_row_bytes)
        rendered = answer_template.render_each(row.fields, cfg.join)
        if not rendered:
            raise FieldError("the list of answers is empty")
        answers = [replaced(text, cfg.replace_in_answer) for text in rendered]
        for answer in answers:
            check_text("answer", answer, cfg.max_row_bytes)
        place = f"{self._file.name}:{row.line}"
        same = not prompt_template.fields
        if len(answers) == 1:
            return [Item(place, prompt, answers[0], same)]
        return [Item(f"{place}#{which}", prompt, text, same) for which, text in enumerate(answers)]


def _training_items(
    rows: _Rows, evaluation: EvaluationRows, hold_out: HoldOut, cfg: TextConfig
) -> Iterator[Item]:
    """What is for training; on the way the evaluation splits are collected."""
    for split in ("test", "validation"):
        for item in rows.items(split):
            rows.repeated += not evaluation.add(split, item)
    given = 0
    reading = _divided(rows, evaluation, hold_out)
    for source in (reading, hold_out.close()):
        for split, item in source:
            if split != "train":
                evaluation.add(split, item)
            elif given != cfg.max_train_rows:
                yield item
                given += 1
            if given == cfg.max_train_rows and source is reading:
                break


def _divided(
    rows: _Rows, evaluation: EvaluationRows, hold_out: HoldOut
) -> Iterator[tuple[Split, Item]]:
    from_files = any(rows.files[split] for split in ("validation", "test"))
    for item in rows.items("train"):
        if from_files and evaluation.split_of(item.key) is not None:
            rows.repeated += 1
        else:
            yield from hold_out.place(item)


def _first(examples: Iterator[Example], count: int | None) -> Iterator[Example]:
    for number, example in enumerate(examples):
        if number == count:
            return
        yield example


def _write(out: Output, split: Split, examples: Iterable[Example], count: _Count) -> None:
    """Write a split as shards; an empty one as an empty table, so that every split can be read."""
    waiting: list[dict[str, Any]] = []
    with out.shards(split) as shards:
        for example in examples:
            count.add(example)
            waiting.append({name: getattr(example, name) for name in SCHEMA.names})
            if len(waiting) == _TABLE_ROWS:
                shards.write(pa.Table.from_pylist(waiting, schema=SCHEMA))
                waiting.clear()
        shards.write(pa.Table.from_pylist(waiting, schema=SCHEMA))
    if shards.rows == 0:
        out.table(split, SCHEMA.empty_table())


def _report(rows: _Rows, counts: dict[Split, _Count], out: Output) -> None:
    out.table("quarantine", pa.Table.from_pylist(rows.reasons, schema=_QUARANTINE))
    summary = {split: dict(vars(count)) for split, count in counts.items()}
    named = {role: [file.name for file in each] for role, each in rows.files.items()}
    facts = {"rows_read": rows.total, "quarantined": rows.bad, "also_in_evaluation": rows.repeated}
    out.json("facts", {**facts, "files": named, "splits": summary})
    out.metrics(**facts, corpus=summary)
