"""The model and its loss in PyTorch, for `benchmarks.train_step`.

AST and DistilBERT are Hugging Face's. The video encoder follows EgoVLP's code (`model/video_transformer.py` of
showlab/EgoVLP): for each attention, heads and groups are moved into the batch axis, the class token attends to all tokens,
and its key and value are copied into every group. With `fused=True`, PyTorch's scaled_dot_product_attention replaces matmul
and softmax, and heads have an axis of their own after the batch, as its kernels expect. Attention over time, whose five keys
a kernel for long sequences would pad, is then sums of products, which torch.compile fuses; without it they take much memory.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ASTConfig, ASTModel, DistilBertConfig, DistilBertModel

from mc3_jax.config import ModelConfig


def _attend(query, key, value):
    """Returns the attention output of arrays [groups, tokens, width of a head]."""
    weights = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
    return weights @ value


class DividedAttention(nn.Module):
    """Attention of each patch to its frame ("space") or its place ("time") and the class token, and of that to all tokens."""

    def __init__(self, width: int, num_heads: int, over: str, fused: bool):
        super().__init__()
        self.num_heads, self.over, self.fused = num_heads, over, fused
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, num_frames: int):
        b, n, width = x.shape
        # [b, n, 3 w] -> three of [b, h, n, d]
        parts = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = self._fused(*parts, num_frames) if self.fused else self._eager(*parts, num_frames)
        return self.out(out.transpose(1, 2).reshape(b, n, width))

    def _eager(self, query, key, value, num_frames: int):
        b, h, n, d = query.shape
        places = (n - 1) // num_frames
        query, key, value = (part.reshape(b * h, n, d) for part in (query, key, value))
        class_out = _attend(query[:, :1], key, value)

        def group(part):  # patches of a clip -> [groups, patches of a group, d]
            part = part.view(len(part), num_frames, places, d)
            return (part.transpose(1, 2) if self.over == "time" else part).flatten(0, 1)

        def with_class(part):
            patches = group(part[:, 1:])
            first = part[:, :1].repeat_interleave(len(patches) // len(part), dim=0)
            return torch.cat([first, patches], dim=1)

        out = _attend(group(query[:, 1:]), with_class(key), with_class(value))
        shape = (places, num_frames) if self.over == "time" else (num_frames, places)
        out = out.view(b * h, *shape, d)
        out = (out.transpose(1, 2) if self.over == "time" else out).reshape(b * h, n - 1, d)
        return torch.cat([class_out, out], dim=1).view(b, h, n, d)

    def _fused(self, query, key, value, num_frames: int):
        class_out = F.scaled_dot_product_attention(query[:, :, :1], key, value)
        attend = self._over_time if self.over == "time" else self._over_space
        return torch.cat([class_out, attend(query, key, value, num_frames).flatten(2, 3)], dim=2)

    def _over_time(self, query, key, value, num_frames: int):
        """Returns the patches' output [b, h, frames, places, d], by sums that torch.compile makes few kernels of.

        Matrix products on four axes would not do: Inductor recognises attention in them and calls SDPA after all.
        """

        def group(part):
            return part[:, :, 1:].unflatten(2, (num_frames, -1))

        def with_class(part):
            patches = group(part)
            first = part[:, :, None, :1].expand(-1, -1, -1, patches.shape[3], -1)
            return torch.cat([first, patches], dim=2)

        scores = (group(query)[:, :, :, None] * with_class(key)[:, :, None]).sum(-1) * query.shape[-1] ** -0.5
        out = (scores.softmax(3)[..., None] * with_class(value)[:, :, None]).sum(3)
        return out.to(value.dtype)  # autocast's softmax is in float32

    def _over_space(self, query, key, value, num_frames: int):
        """Returns the patches' output [b, h, frames, places, d], by PyTorch's scaled_dot_product_attention."""

        def group(part):  # patches of a clip -> [b, frames, h, places, d]
            return part.unflatten(2, (num_frames, -1)).transpose(1, 2)

        def with_class(part):
            patches = group(part[:, :, 1:])
            first = part[:, None, :, :1].expand(-1, num_frames, -1, -1, -1)
            return torch.cat([first, patches], dim=3).flatten(0, 1)

        asked = group(query[:, :, 1:])
        out = F.scaled_dot_product_attention(asked.flatten(0, 1), with_class(key), with_class(value))
        return out.view(asked.shape).transpose(1, 2)


class SpaceTimeBlock(nn.Module):
    """EgoVLP's block, in which the output of the space attention is added to the block's input."""

    def __init__(self, width: int, num_heads: int, fused: bool):
        super().__init__()
        self.norm_time, self.norm_space, self.norm_mlp = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.time = DividedAttention(width, num_heads, "time", fused)
        self.space = DividedAttention(width, num_heads, "space", fused)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, num_frames: int):
        time = self.time(self.norm_time(x), num_frames)
        x = x + self.space(self.norm_space(x + time), num_frames)
        return x + self.mlp(self.norm_mlp(x))


class VideoEncoder(nn.Module):
    def __init__(self, config, fused: bool):
        super().__init__()
        width, places = config.width, (config.image_size_px // config.patch_px) ** 2
        self.patches = nn.Conv2d(3, width, config.patch_px, config.patch_px)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + places, width) * 0.02)
        self.temporal = nn.Parameter(torch.zeros(1, config.num_positions, width))
        self.blocks = nn.ModuleList(SpaceTimeBlock(width, config.num_heads, fused) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, video):
        """Returns the class token [b, w] after the final norm, for frames [b, t, 3, y, x]."""
        b, t = video.shape[:2]
        patches = self.patches(video.flatten(0, 1)).flatten(2).transpose(1, 2)  # [b t, p, w]
        patches = patches.reshape(b, -1, patches.shape[-1])
        places = self.position.shape[1] - 1
        position = self.position[:, 1:].repeat(1, t, 1) + self.temporal[:, :t].repeat_interleave(places, 1)
        first = (self.class_token + self.position[:, :1]).expand(b, -1, -1)
        x = torch.cat([first, patches + position], dim=1)
        for block in self.blocks:
            x = block(x, t)
        return self.norm(x)[:, 0]


class ThreeTowers(nn.Module):
    """The towers in a config's sizes; returns the six-pair InfoNCE of their embeddings."""

    def __init__(self, config: ModelConfig, *, fused: bool):
        super().__init__()
        audio, video, text = config.audio, config.video, config.text
        attention = "sdpa" if fused else "eager"
        self.audio = ASTModel(
            ASTConfig(
                hidden_size=audio.width, num_hidden_layers=audio.depth, num_attention_heads=audio.num_heads,
                intermediate_size=4 * audio.width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                patch_size=audio.patch_px, frequency_stride=audio.stride_px, time_stride=audio.stride_px,
                max_length=audio.num_time_frames, num_mel_bins=audio.num_mel, attn_implementation=attention,
            )
        )  # fmt: skip
        self.text = DistilBertModel(
            DistilBertConfig(
                vocab_size=text.vocab_size, max_position_embeddings=text.num_positions, dim=text.width,
                n_layers=text.depth, n_heads=text.num_heads, hidden_dim=text.mlp_width, dropout=text.dropout,
                attention_dropout=text.dropout, attn_implementation=attention,
            )
        )  # fmt: skip
        self.video = VideoEncoder(video, fused)
        self.audio_head = nn.Sequential(nn.LayerNorm(audio.width), nn.Linear(audio.width, config.embed_dim))
        self.video_head = nn.Linear(video.width, config.embed_dim)
        self.text_head = nn.Sequential(nn.ReLU(), nn.Linear(text.width, config.embed_dim))

    def forward(self, audio, video, text_ids, text_mask):
        """Returns the scalar loss for log-mel [b, t, f], frames [b, t, 3, y, x], ids and mask [b, l]."""
        heard = self.audio_head(self.audio(audio).pooler_output)
        seen = self.video_head(self.video(video))
        read = self.text_head(self.text(text_ids, text_mask).last_hidden_state[:, 0])
        x, y, z = (F.normalize(embedding.float(), dim=1) for embedding in (heard, seen, read))
        target = torch.arange(len(x), device=x.device)
        loss = 0.0
        for one, other in ((x, y), (x, z), (y, z)):
            logits = one @ other.T / 0.05
            loss = loss + F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        return loss


def clip_flops(config: ModelConfig) -> float:
    """Returns the FLOPs that a clip takes in a training step: three times those of the forward pass, as PyTorch counts them.

    `mfu.model_flops` counts ours in the same way, but these towers compute all tokens of their last blocks.
    """
    size = config.video.image_size_px
    with torch.device("meta"), FlopCounterMode(display=False) as counted:  # nothing is computed
        audio = torch.empty(1, config.audio.num_time_frames, config.audio.num_mel)
        video = torch.empty(1, config.video.num_frames, 3, size, size)
        text_ids = torch.empty(1, config.text.num_tokens, dtype=torch.int64)
        ThreeTowers(config, fused=False)(audio, video, text_ids, None)
    return 3.0 * counted.get_total_flops()
