"""ECAPA-TDNN: a speaker embedding network.

Source: B. Desplanques, J. Thienpondt, K. Demuynck, "ECAPA-TDNN: Emphasized Channel Attention,
Propagation and Aggregation in TDNN Based Speaker Verification", Interspeech 2020, figures 1-2.

    features (B, F, T)
      -> conv 5 -> ReLU -> BN                                        h            (B, C, T)
      -> SE-Res2Block, dilation 2, of h                              x1
      -> SE-Res2Block, dilation 3, of h + x1                         x2
      -> SE-Res2Block, dilation 4, of h + x1 + x2                    x3
      -> [x1; x2; x3] -> conv 1 -> ReLU                              aggregation  (B, M, T)
      -> attentive statistics pooling -> BN                                       (B, 2M)
      -> linear -> BN                                                embedding    (B, E)

B utterances   F feature dimensions   T frames   C channels   M aggregated channels
E embedding dimensions   S channels of the squeeze-excitation bottleneck

A padded batch gives the embeddings of its utterances alone: padded frames are zeroed before every
convolution that looks at neighbours (so its own zero padding begins where the utterance ends), and
means, deviations, softmax and BatchNorm's statistics count real frames only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from goldcrest.kernels.speaker.pooling import (
    AspVariant,
    AttentiveStatisticsPooling,
    MaskedBatchNorm1d,
    PoolingSettings,
    length_mask,
    masked_mean,
)


@dataclass(frozen=True, kw_only=True)
class EcapaSettings:
    """The network's sizes; the defaults are the paper's small network on 40 features.

    With the defaults it has 6.1 M parameters, with `channels=1024, input_dim=80` 14.7 M (table 1).
    """

    input_dim: int = 40  # F, features per frame
    channels: int = 512  # C, channels of the frame layers (512 or 1024 in the paper)
    mfa_channels: int = 1536  # M, channels after multi-layer feature aggregation
    attention_channels: int = 128  # bottleneck of the pooling's attention, section 2.1
    se_channels: int = 128  # S, bottleneck of squeeze-excitation, section 2.2
    embedding_dim: int = 192  # E
    dilations: tuple[int, ...] = (2, 3, 4)  # one SE-Res2Block each, frames
    scale: int = 8  # groups of a Res2 convolution, section 2.2
    asp_variant: AspVariant = "ecapa"  # "tao": ReLU and BatchNorm before the attention's tanh
    dropout: float = 0.0  # share of embedding dimensions dropped in training, after the last layer

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilations", tuple(self.dilations))  # JSON gives lists
        for name in (
            "input_dim",
            "channels",
            "mfa_channels",
            "attention_channels",
            "se_channels",
            "embedding_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.scale < 2:
            raise ValueError(f"scale must be at least 2, not {self.scale}")
        if self.channels % self.scale:
            raise ValueError(
                f"channels must be divisible by scale: {self.channels} channels do not split into "
                f"{self.scale} equal groups"
            )
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations must be whole numbers from 1, not {self.dilations}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


class ConvReluNorm(nn.Module):
    """Convolution over time, ReLU, BatchNorm (in this order), keeping the number of frames."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=padding, dilation=dilation)
        self.norm = MaskedBatchNorm1d(outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, inputs, T) -> (B, outputs, T); padded frames of `x` are read as zeros."""
        if mask is not None:
            x = x * mask.to(x.dtype)
        return self.norm(torch.relu(self.conv(x)), mask)


class Res2Conv(nn.Module):
    """Convolutions over channel groups, each fed with the group before it (section 2.2).

    y_1 = K_1(u_1),   y_k = K_k(u_k + y_{k-1}) for k < scale,   y_scale = u_scale
    """

    def __init__(self, channels: int, scale: int, kernel: int, dilation: int) -> None:
        super().__init__()
        width = channels // scale
        self.scale = scale
        self.groups = nn.ModuleList(
            ConvReluNorm(width, width, kernel, dilation) for _ in range(scale - 1)
        )

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        parts = u.chunk(self.scale, dim=1)
        outputs: list[Tensor] = []
        for group, part in zip(self.groups, parts, strict=False):
            outputs.append(group(part + outputs[-1] if outputs else part, mask))
        return torch.cat([*outputs, parts[-1]], dim=1)


class SqueezeExcitation(nn.Module):
    """Scale every channel by a gate that sees all channels' means over time (section 2.2)."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, bottleneck)
        self.excite = nn.Linear(bottleneck, channels)

    def forward(self, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) -> (B, C, T): s = sigmoid(W2 ReLU(W1 mean_t v)), output s * v."""
        mean = masked_mean(v, mask).to(v.dtype)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(mean))))
        return v * gate[:, :, None]


class SERes2Block(nn.Module):
    """1x1 convolution, Res2 convolution, 1x1 convolution, squeeze-excitation, residual."""

    def __init__(self, settings: EcapaSettings, dilation: int) -> None:
        super().__init__()
        channels = settings.channels
        self.enter = ConvReluNorm(channels, channels)
        self.res2 = Res2Conv(channels, settings.scale, kernel=3, dilation=dilation)
        self.leave = ConvReluNorm(channels, channels)
        self.gate = SqueezeExcitation(channels, settings.se_channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        v = self.leave(self.res2(self.enter(x, mask), mask), mask)
        return x + self.gate(v, mask)


class EcapaTdnn(nn.Module):
    """Features (B, F, T) -> speaker embeddings (B, E), not length-normalised."""

    def __init__(self, settings: EcapaSettings) -> None:
        super().__init__()
        self.settings = settings
        channels, wide = settings.channels, settings.mfa_channels
        self.enter = ConvReluNorm(settings.input_dim, channels, kernel=5)
        self.layers = nn.ModuleList(SERes2Block(settings, d) for d in settings.dilations)
        self.aggregate = nn.Conv1d(len(settings.dilations) * channels, wide, kernel_size=1)
        self.pooling = AttentiveStatisticsPooling(
            PoolingSettings(
                channels=wide,
                attention_channels=settings.attention_channels,
                variant=settings.asp_variant,
            )
        )
        self.pooling_norm = MaskedBatchNorm1d(2 * wide)
        self.embed = nn.Linear(2 * wide, settings.embedding_dim)
        self.embed_norm = MaskedBatchNorm1d(settings.embedding_dim)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed a batch.

        Args:
            features: (B, F, T) float32, utterances padded at the end with anything finite.
            lengths: (B,) int, real frames of each utterance; None if all T frames are real.

        Returns:
            (B, E) in the precision of the network's weights.

        Raises:
            ValueError: features that are not (B, F, T), or a length outside 1..T.
        """
        return self.blocks(features, lengths)[0]

    def blocks(
        self, features: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`forward`, with the outputs x1, x2, x3 of the blocks, each (B, C, T), for distillation.

        Padded frames of the block outputs are zero.
        """
        if features.ndim != 3 or features.shape[1] != self.settings.input_dim:
            raise ValueError(
                f"features must be (batch, {self.settings.input_dim}, frames), "
                f"not {tuple(features.shape)}"
            )
        mask = None if lengths is None else length_mask(lengths, features.shape[2])
        total = self.enter(features.to(self.embed.weight.dtype), mask)
        outputs: list[Tensor] = []
        for layer in self.layers:
            output = layer(total, mask)
            outputs.append(output if mask is None else output * mask.to(output.dtype))
            total = total + output
        h = torch.relu(self.aggregate(torch.cat(outputs, dim=1)))
        pooled = self.pooling_norm(self.pooling(h, mask).to(h.dtype))
        return self.dropout(self.embed_norm(self.embed(pooled))), outputs
