"""Small untrained language bundles for the generate endpoint, and calls of its server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from tests.pipelines.speaker_server import Server

TOKEN = "a-token-of-the-tests-3f9c1b"
SPECIAL = ["<pad>", "<s>", "</s>", "<|turn|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.first %}{{ raise_exception('users begin') }}{% endif %}"
    "<|turn|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path, *, template: str | None = None) -> int:
    """A tokenizer of printable ASCII, a letter a token; its number of tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # byte-level: space, line break
    vocabulary = {name: number for number, name in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    if template is not None:
        made.chat_template = template
    made.save_pretrained(folder)
    return len(vocabulary)


def make_text_bundle(
    folder: Path, *, seed: int = 0, template: str | None = None, context: int = 100_000
) -> Path:
    """A Llama of random weights that are large enough for its answers to vary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from goldcrest.cluster.artifact import Output
    from goldcrest.cluster.runtime import LocalRuntime
    from goldcrest.tasks.language.bundle import write_bundle

    folder.mkdir(parents=True)
    tokenizer = folder.parent / f"{folder.name}-tokenizer"
    config = LlamaConfig(
        vocab_size=make_tokenizer(tokenizer, template=template),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.7,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL)] = 0  # an answer of letters alone, which does not end
    out = Output(folder, runtime=LocalRuntime(), seed=0, scratch=folder.parent / "scratch")
    write_bundle(
        out,
        name="dense",
        family="causal",
        config=config,
        tensors=model.state_dict(),
        tokenizer=tokenizer,
        facts={},
    )
    return folder


def make_speech_bundle(folder: Path) -> Path:
    """A Whisper of random weights that hears up to a second and writes letters."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from goldcrest.cluster.artifact import Output
    from goldcrest.cluster.runtime import LocalRuntime
    from goldcrest.kernels.language.architectures import own_state
    from goldcrest.tasks.language.bundle import write_bundle

    folder.mkdir(parents=True)
    tokenizer = folder.parent / f"{folder.name}-tokenizer"
    config = WhisperConfig(
        vocab_size=make_tokenizer(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=50,
        max_target_positions=24,
        init_std=0.7,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        model.get_output_embeddings().weight[: len(SPECIAL)] = 0
    write_bundle(
        Output(folder, runtime=LocalRuntime(), seed=0, scratch=folder.parent / "scratch"),
        name="dense",
        family="speech",
        config=config,
        tensors=own_state(model),
        tokenizer=tokenizer,
        facts={},
    )
    return folder


class TextClient:
    """Calls of one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._headers = {"Authorization": f"Bearer {server.token}"}

    def get(self, path: str) -> requests.Response:
        """A request to any path."""
        return requests.get(self.server.url + path, headers=self._headers, timeout=60)

    def post(self, path: str, *, seconds: float = 60.0, **body: Any) -> requests.Response:
        """A JSON request to `/v1/PATH`; the client leaves after `seconds` without an answer."""
        return self._post(path, body, seconds)

    def hear(self, audio: bytes, **form: Any) -> requests.Response:
        """A recording to `/v1/audio/transcriptions`."""
        return requests.post(
            f"{self.server.url}/v1/audio/transcriptions",
            files={"file": ("a.wav", audio)},
            data=form,
            headers=self._headers,
            timeout=60,
        )

    def complete(self, prompt: Any, **more: Any) -> Any:
        """The answer of `/v1/completions`."""
        answer = self.post("completions", prompt=prompt, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def text(self, prompt: Any, **more: Any) -> str:
        """The text of its first choice, greedy."""
        return str(self.complete(prompt, temperature=0, **more)["choices"][0]["text"])

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream that must be whole, without `[DONE]`."""
        with self._post(path, {"stream": True, **body}, 60.0, stream=True) as answer:
            assert answer.status_code == 200, answer.text
            lines = [line.decode() for line in answer.iter_lines() if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    @contextmanager
    def opened(self, **body: Any) -> Iterator[Iterator[str]]:
        """The lines of a greedy stream of `/v1/completions` that is left at the block's end."""
        body = {"stream": True, "temperature": 0, **body}
        with self._post("completions", body, 60.0, stream=True) as answer:
            assert answer.status_code == 200, answer.text
            yield (line.decode() for line in answer.iter_lines(chunk_size=1) if line)

    def _post(
        self, path: str, body: Any, seconds: float, *, stream: bool = False
    ) -> requests.Response:
        return requests.post(
            f"{self.server.url}/v1/{path}",
            json=body,
            headers=self._headers,
            timeout=seconds,
            stream=stream,
        )
