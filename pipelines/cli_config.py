"""`goldcrest config show|diff|schema`: look at configurations without running anything."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from goldcrest.cluster.api import Config
from goldcrest.cluster.config_file import describe_fields, difference, load_config, to_yaml
from goldcrest.cluster.masking import is_secret_name, mask_secrets
from goldcrest.pipelines.cli_common import (
    ConfigOption,
    CorpusOption,
    EvalCorpusOption,
    JsonOption,
    OverrideOption,
    PipelineArgument,
    answering,
    print_table,
    say,
)
from goldcrest.pipelines.discovery import Pipeline, find_config, load_pipeline

app = typer.Typer(no_args_is_help=True, help="show, compare and describe configurations")


def corpus_fields(corpus: list[str] | None, eval_corpus: list[str] | None) -> dict[str, Any]:
    """Config fields that `--corpus` and `--eval-corpus` set; local paths become absolute."""
    from pathlib import Path

    def absolute(text: str) -> str:
        return str(Path(text).expanduser().resolve()) if Path(text).expanduser().exists() else text

    fields: dict[str, Any] = {}
    if corpus:
        fields["corpus.paths"] = [absolute(text) for text in corpus]
    if eval_corpus:
        fields["corpus.eval_paths"] = [absolute(text) for text in eval_corpus]
    return fields


def make_config(
    pipeline: Pipeline,
    config: str | None,
    overrides: list[str] | None,
    corpus: list[str] | None = None,
    eval_corpus: list[str] | None = None,
) -> Config:
    """The pipeline's config from its file, the corpus options and the overrides, validated."""
    return load_config(
        pipeline.config_class,
        file=find_config(pipeline.name, config),
        fields=corpus_fields(corpus, eval_corpus),
        overrides=overrides or (),
    )


@app.command()
def show(
    pipeline: PipelineArgument,
    config: ConfigOption = None,
    corpus: CorpusOption = None,
    eval_corpus: EvalCorpusOption = None,
    override: OverrideOption = None,
    json_file: JsonOption = None,
) -> None:
    """Print the complete configuration that a run would use."""
    with answering(json_file) as answer:
        made = make_config(load_pipeline(pipeline), config, override, corpus, eval_corpus)
        answer.value = mask_secrets(made.model_dump(mode="json"))
        say(to_yaml(answer.value).rstrip())


@app.command()
def diff(
    pipeline: PipelineArgument,
    left: Annotated[str, typer.Argument(help="a config: a YAML file or a name such as `tiny`")],
    right: Annotated[
        str | None, typer.Argument(help="another one; left out: LEFT against the defaults")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """List the fields in which two configurations differ."""
    with answering(json_file) as answer:
        found = load_pipeline(pipeline)
        one = make_config(found, left, None)
        two = make_config(found, right, None)
        names = (left, right) if right else ("defaults", left)
        pairs = difference(one, two) if right else difference(two, one)
        rows = [(name, *(_value(name, value) for value in values)) for name, *values in pairs]
        answer.value = [{"field": f, "left": a, "right": b} for f, a, b in rows]
        if rows:
            print_table(
                "", ["field", *names], [[f, json.dumps(a), json.dumps(b)] for f, a, b in rows]
            )
        else:
            say("no differences")


def _value(name: str, value: Any) -> Any:
    return "***" if any(map(is_secret_name, name.split("."))) else mask_secrets(value)


@app.command()
def schema(pipeline: PipelineArgument, json_file: JsonOption = None) -> None:
    """Describe every field: type, default, meaning (`--json`: as a JSON schema)."""
    with answering(json_file) as answer:
        config_class = load_pipeline(pipeline).config_class
        answer.value = config_class.model_json_schema()
        columns = ["field", "type", "default", "description"]
        rows = [[row[column] for column in columns] for row in describe_fields(config_class)]
        print_table("", columns, rows)
